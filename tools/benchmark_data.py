"""Time how fast training data are read, and compare it with what a pod needs.

    python -m tools.benchmark_data [--pod=v5e-16] [--model=XL] [--mfu=0.45] [--json=FILE]

Latents as tools.prepare_latents writes them for 256 pixels, random ones, and JPEG photographs of 500 x 375 pixels that
are decoded and cropped, through the pipeline that training uses. Rounds go through all forms in turn, so that what
disturbs the machine disturbs them alike; a rate is the median over rounds. Nothing else should run.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from diversedit_jax import data, flops, logs, models, program
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError
from diversedit_jax.models.dit import SIZES
from tools import latent_shards, photographs


class Pod(NamedTuple):
    """chips, hosts, and the peak of a chip in bfloat16, FLOP/s."""

    chips: int
    hosts: int
    peak: float


PODS = {"v4-32": Pod(16, 4, 275e12), "v5e-16": Pod(16, 4, 197e12), "v5p-64": Pod(32, 8, 459e12)}
PODS |= {"v6e-16": Pod(16, 4, 918e12)}
SHAPE = (32, 32, 4)  # latents of 256 pixels
RECORDS, PHOTOS = 4096, 256

# what is read, and with which options
FORMS = {
    "latents, calling thread": ("latents", {"num_threads": 0}),
    "latents, 2 threads": ("latents", {"num_threads": 2}),
    "latents, 4 threads": ("latents", {"num_threads": 4}),
    "latents, 1 worker": ("latents", {"num_workers": 1, "num_threads": 2}),
    "crops, 2 threads": ("crops", {"num_threads": 2}),
    "crops, 4 threads": ("crops", {"num_threads": 4}),
    "crops, 2 workers": ("crops", {"num_workers": 2, "num_threads": 1}),
}


def need(pod: Pod, model: str, mfu: float) -> float:
    """Images that a host must read in a second, while the chips compute at this part of their peak."""
    network = models.make("dit", SHAPE, 1000, size=model)
    params = jax.eval_shape(network.init, jax.random.key(0))
    forward = flops.of(network.apply, params, jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    return pod.chips * pod.peak * mfu / (3 * forward) / pod.hosts


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


# by kind: examples of a batch, batches of a timing. Threads prepare whole batches, which then come in bursts: there are
# many more batches than threads.
SIZES_OF = {"latents": (256, 64), "crops": (16, 32)}


def once(dataset: data.Dataset, kind: str, options: dict[str, int]) -> tuple[float, float]:
    """Seconds to the first batch of a form, and the examples that it reads in a second after that."""
    size, count = SIZES_OF[kind]
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


def measure(datasets: dict[str, data.Dataset], rounds: int) -> dict[str, dict[str, float]]:
    """By form: seconds to the first batch, and examples a second, medians over rounds; one form runs at a time."""
    found = {name: [] for name in FORMS}
    for _ in range(rounds):
        for name, (kind, options) in FORMS.items():
            found[name].append(once(datasets[kind], kind, options))
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    return {name: {"first_batch_s": first, "per_s": rate} for name, (first, rate) in medians.items()}


if __name__ == "__main__":
    flags.DEFINE_enum("pod", "v5e-16", list(PODS), "What the rates are compared with.")
    flags.DEFINE_enum("model", "XL", list(SIZES), "Size of the model that trains there.")
    flags.DEFINE_float("mfu", 0.45, "The part of their peak at which its chips compute.")
    flags.DEFINE_integer("rounds", 5, "How often each form is timed.")
    flags.DEFINE_string("json", None, "File to write the figures to.")

    def main() -> None:
        """Measure, print, write."""
        logs.silence()
        given = {name: flags.FLAGS[name].value for name in ("pod", "model", "mfu", "rounds")}
        if given["rounds"] < 1 or not 0 < given["mfu"] <= 1:
            raise ConfigError(f"rounds = {given['rounds']}, mfu = {given['mfu']}: wanted at least 1, and a part of 1")
        wanted = need(PODS[given["pod"]], given["model"], given["mfu"])
        with tempfile.TemporaryDirectory() as home:
            datasets = {"latents": write_latents(Path(home) / "latents")}
            datasets["crops"] = write_photographs(Path(home) / "photographs")
            found = measure(datasets, given["rounds"])
        print(f"{os.cpu_count()} cores; a host of {given['pod']} needs {wanted:,.0f} images/s")
        print(f"  ({given['model']}/2, 256 pixels, at {given['mfu']:.0%} of the peak)")
        print(f"{'':<26}{'per second':>12}{'x need':>9}{'first batch':>13}")
        for name, row in found.items():
            rate, first = row["per_s"], row["first_batch_s"]
            print(f"{name:<26}{rate:>12,.0f}{rate / wanted:>9.1f}{first:>11.2f} s")
        if flags.FLAGS.json:
            figures = {"versions": logs.versions() | {"cores": os.cpu_count()}, "flags": given}
            figures |= {"need_per_host": wanted, "forms": found}
            Path(flags.FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")

    program.launch(main)
