"""Time the reading of training data, beside the rate that one host of a pod needs to train the config.

Read through the pipeline of training: random latents of 256 pixels, as tools.prepare_latents writes them; JPEG
photographs of 500 x 375 pixels, decoded and cropped; and the data of the config, with the options of `config.input`,
if `config.data.data_dir` is set.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import data
from diversedit_jax.data import pipeline
from diversedit_jax.registry import in_range
from diversedit_jax.runs import build
from tools import latent_shards
from tools.benchmark import random_run, timing
from tools.pod_plan import tpu
from tools.studies import photographs

SHAPE = (32, 32, 4)  # latents of 256 pixels
RECORDS, PHOTOS = 4096, 256

# Name: (kind of data, options of the pipeline).
FORMS = {
    "latents, calling thread": ("latents", {"num_threads": 0}),
    "latents, 2 threads": ("latents", {"num_threads": 2}),
    "latents, 4 threads": ("latents", {"num_threads": 4}),
    "latents, 1 worker": ("latents", {"num_workers": 1, "num_threads": 2}),
    "crops, 2 threads": ("crops", {"num_threads": 2}),
    "crops, 4 threads": ("crops", {"num_threads": 4}),
    "crops, 2 workers": ("crops", {"num_workers": 2, "num_threads": 1}),
}
# Kind: (examples of a batch, batches of a timing). Many more batches than threads, because batches come in bursts: each
# thread prepares a whole batch.
AMOUNTS = {"latents": (256, 64), "crops": (16, 32), "config.data": (256, 64)}
COLUMNS = {"examples/s": ("per_s", 0), "times the need": ("of_need", 1), "first batch s": ("first_batch_s", 2)}


def need(config: ConfigDict, pod: tpu.Slice, mfu: float) -> float:
    """Images per second that a host must read if the chips train the config at the share `mfu` of their peak."""
    work = random_run.make(config).work() / config.batch_size
    return pod.peak * mfu / work / pod.hosts


def write_latents(folder: Path) -> data.Dataset:
    """Write a set of random latents."""
    about = {"format": 1, "moments": "mean_std", "shape": list(SHAPE), "classes": None, "vae": {"scale": None}}
    features = latent_shards.features(SHAPE, 256, None, {}, ())
    plan = latent_shards.Plan(about, features, RECORDS, RECORDS // 4)
    latent_shards.claim(folder, plan)
    rng = np.random.default_rng(0)

    def records(shard: int) -> Iterator[dict[str, Any]]:
        for number in plan.images(shard):
            moments = rng.standard_normal((2, *SHAPE[:2], 2 * SHAPE[2]), np.float32).astype(np.float16)
            yield {"moments": moments, "key": str(number), "label": 0}

    for shard in range(plan.shards):
        latent_shards.write_shard(folder, plan, shard, records(shard), {})
    latent_shards.finish(folder, plan)
    return data.make("latents", "train", data_dir=str(folder), mirror=True)


def write_photographs(folder: Path) -> data.Dataset:
    """Write JPEG photographs of 500 x 375 pixels, the average of ImageNet."""
    folder.mkdir()
    names = list(photographs.PHOTOGRAPHS)
    for number in range(PHOTOS):
        image = photographs.photograph(names[number % len(names)]).resize((500, 375))
        image.save(folder / f"{number:04d}.jpg", quality=92)
    return data.make("images", "train", data_dir=str(folder), size=256, mirror=True)


def once(dataset: data.Dataset, kind: str, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first batch, and the examples per second after that."""
    size, count = AMOUNTS[kind]
    begin = time.perf_counter()
    with contextlib.closing(pipeline.batches(dataset, size, 0, **options)) as loader:
        next(loader)
        first = time.perf_counter() - begin
        for _ in range(8):  # prepared ahead, while the first was awaited
            next(loader)
        begin = time.perf_counter()
        for _ in range(count):
            next(loader)
        return first, count * size / (time.perf_counter() - begin)


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures and their table."""
    in_range("--mfu", given.mfu, above=0, high=1)
    pod, forms = tpu.parse(given.pod), dict(FORMS)
    wanted = need(given.config, pod, given.mfu)
    found: dict[str, list[tuple[float, float]]] = {}  # of each form, `once` in each round
    with tempfile.TemporaryDirectory() as home:
        datasets = {"latents": write_latents(Path(home) / "latents")}
        datasets["crops"] = write_photographs(Path(home) / "photographs")
        if given.config.data.get("data_dir"):
            datasets["config.data"] = build.open_data(given.config)
            forms["config.data"] = "config.data", configs.keywords(given.config.input, "config.input", pipeline.batches)
        for _ in range(given.rounds):
            for name, (kind, options) in forms.items():
                found.setdefault(name, []).append(once(datasets[kind], kind, options))
    rows = []
    for name, rounds in found.items():
        firsts, rates = zip(*rounds, strict=True)
        per_s = timing.spread(rates)
        row = {"name": name, "per_s": per_s, "of_need": per_s["median"] / wanted}
        rows.append(row | {"first_batch_s": statistics.median(firsts)})
    note = (
        f"A host of a {pod.named} that trains this config at {given.mfu:.0%} of its peak needs {wanted:,.0f} images/s."
    )
    return {"need_per_host": wanted, "rows": rows}, f"{timing.table_of(rows, COLUMNS)}\n\n{note}"
