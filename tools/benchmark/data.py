"""Reading training data, in forms in turn, beside what a host of a pod needs that trains the config.

Latents as tools.prepare_latents writes them for 256 pixels, random ones, and JPEG photographs of 500 x 375 pixels that
are decoded and cropped, through the pipeline that training uses; where the config says where its own data lie,
`config.data.data_dir`, also those, read as `config.input` has it.
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
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build
from tools import latent_shards
from tools.benchmark import random_run, timing
from tools.benchmark.timing import spread_of
from tools.pod_plan import tpu
from tools.studies import photographs

SHAPE = (32, 32, 4)  # latents of 256 pixels
RECORDS, PHOTOS = 4096, 256

# What is read, and with which options.
FORMS = {
    "latents, calling thread": ("latents", {"num_threads": 0}),
    "latents, 2 threads": ("latents", {"num_threads": 2}),
    "latents, 4 threads": ("latents", {"num_threads": 4}),
    "latents, 1 worker": ("latents", {"num_workers": 1, "num_threads": 2}),
    "crops, 2 threads": ("crops", {"num_threads": 2}),
    "crops, 4 threads": ("crops", {"num_threads": 4}),
    "crops, 2 workers": ("crops", {"num_workers": 2, "num_threads": 1}),
}
# By kind: examples of a batch, batches of a timing. Threads prepare whole batches, which then come in bursts: there are
# many more batches than threads.
AMOUNTS = {"latents": (256, 64), "crops": (16, 32), "config.data": (256, 64)}


def need(config: ConfigDict, pod: tpu.Slice, mfu: float) -> float:
    """Images that a host must read in a second, while the chips train a config at this part of their peak."""
    work = random_run.make(config).work() / config.batch_size
    return pod.peak * mfu / work / pod.hosts


def write_latents(folder: Path) -> data.Dataset:
    """A set of random latents."""
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
    """Photographs as those of ImageNet are on average: 500 x 375 pixels, JPEG."""
    folder.mkdir()
    names = list(photographs.PHOTOGRAPHS)
    for number in range(PHOTOS):
        image = photographs.photograph(names[number % len(names)]).resize((500, 375))
        image.save(folder / f"{number:04d}.jpg", quality=92)
    return data.make("images", "train", data_dir=str(folder), size=256, mirror=True)


def once(dataset: data.Dataset, kind: str, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first batch of a form, and the examples that it reads in a second after that."""
    size, count = AMOUNTS[kind]
    begin = time.perf_counter()
    with contextlib.closing(pipeline.batches(dataset, size, 0, **options)) as loader:
        next(loader)
        first = time.perf_counter() - begin
        for _ in range(8):  # what was prepared ahead
            next(loader)
        begin = time.perf_counter()
        for _ in range(count):
            next(loader)
        return first, count * size / (time.perf_counter() - begin)


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures of a benchmark with these flags, and their table."""
    if not 0 < given.mfu <= 1:
        raise ConfigError(f"--mfu={given.mfu}: wanted a part of 1")
    pod, forms = tpu.parse(given.pod), dict(FORMS)
    wanted = need(given.config, pod, given.mfu)
    firsts: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as home:
        datasets = {"latents": write_latents(Path(home) / "latents")}
        datasets["crops"] = write_photographs(Path(home) / "photographs")
        if given.config.data.get("data_dir"):
            datasets["config.data"] = build.open_data(given.config)
            forms["config.data"] = "config.data", configs.keywords(given.config.input, "config.input", pipeline.batches)
        for _ in range(given.rounds):
            for name, (kind, options) in forms.items():
                first, rate = once(datasets[kind], kind, options)
                firsts.setdefault(name, []).append(first)
                rates.setdefault(name, []).append(rate)
    rows = [
        {
            "name": name,
            "per_s": timing.spread(values),
            "of_need": statistics.median(values) / wanted,
            "first_batch_s": statistics.median(firsts[name]),
        }
        for name, values in rates.items()
    ]
    lines = [
        [
            found["name"],
            spread_of(found["per_s"], 0),
            timing.number(found["of_need"], 1),
            timing.number(found["first_batch_s"], 2),
        ]
        for found in rows
    ]
    text = timing.table(("", "examples/s", "times the need", "first batch s"), lines)
    need_of = (
        f"A host of a {pod.named} that trains this config at {given.mfu:.0%} of its peak needs {wanted:,.0f} images/s."
    )
    return {"need_per_host": wanted, "rows": rows}, f"{text}\n\n{need_of}"
