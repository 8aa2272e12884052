"""Memory and time of an analysis of a large network on this machine.

    python -m tools.benchmark.analysis [--config=FILE] [--out=tools/benchmark/records/analysis_cpu.json]

The network of a config gets random weights and random latents.

- Measured: the peak of memory while `--count` images pass in batches of `--batch`, and the time of a batch.
- Measured: the peak while all blocks are compared, with random rows as many as `--num` images leave. All comparisons of
  `analyze` run, except Procrustes, which is timed on one pair.
- Computed: the memory that `--num` images add to the first peak (the rows of each, twice while they are joined) and
  their time. Nothing else grows with the images: everything else is a sum.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from diversedit_jax.analysis import measure, study
from diversedit_jax.analysis.measure import TOKENS, Estimator, Settings
from diversedit_jax.config import slot
from diversedit_jax.metrics import similarity
from diversedit_jax.runs import build
from diversedit_jax.runs.build import Experiment
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import write_json
from diversedit_jax.runtime.versions import versions

GB = 1e9


def peak() -> float:
    """The peak of this process's memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB  # Linux counts in kB


def timed(work: Callable, *arguments: Any) -> tuple[float, Any]:
    """The seconds of a call, and its result."""
    begin = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - begin, result


def subject_of(config: ConfigDict) -> tuple[Experiment, dict]:
    """The network of a config, and random parameters for it."""
    config.data, config.codec = slot("data", "synthetic"), slot("codecs", "pixels")
    config.encoders, config.losses = ConfigDict(), ConfigDict()
    experiment = build.build(build.on_this_machine(config), build.open_data(config).space)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(experiment.components.model.init, jax.random.key(0))

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02))

    return experiment, {"params": jax.tree.map(random, shapes)}


def main() -> None:
    """Measure, compute, write."""
    given = flags.FLAGS
    cli.silence()
    with given.config.unlocked():
        experiment, learned = subject_of(given.config)
    settings = Settings(num=given.count, batch=given.batch)
    with_weights = peak()
    shown = measure.batches(build.open_data(experiment.config, "test"), settings, experiment.layout)
    ready = measure.compiled(experiment, settings._replace(num=given.num))  # keeps as few tokens as for `--num` images
    compiled, _ = timed(measure.measure, ready, learned, {}, shown[:1], 0.05)
    seconds, found = timed(measure.measure, ready, learned, {}, shown, 0.05)
    seconds, passing = seconds / len(shown), peak()
    print(f"{given.count} images: peak {passing:.2f} GB, {seconds:.1f} s for a batch of {given.batch}", flush=True)

    blocks, _, width = found.rows["pooled"].shape
    rng = np.random.default_rng(1)
    counts = {"pooled": given.num, "token": TOKENS}
    base = rng.standard_normal((max(counts.values()), width), np.float32)
    rows = {
        unit: np.stack([base[:n] + rng.standard_normal((n, width), np.float32) for _ in range(blocks)])
        for unit, n in counts.items()
    }
    comparing, _ = timed(study.compared, found._replace(rows=rows), Estimator())
    print(f"{given.num} rows: peak {peak():.2f} GB, {comparing:.0f} s", flush=True)
    pair = [jnp.asarray(x) for x in rows["pooled"][:2]]
    one_pair, _ = timed(lambda: similarity.procrustes(pair).block_until_ready())

    parameters = sum(x.size for x in jax.tree.leaves(learned))
    kept = 2 * blocks * width * 4 * sum(counts.values()) / GB
    record = {
        "command": f"python -m tools.benchmark.analysis --count={given.count} --num={given.num} --batch={given.batch}",
        "network": {"blocks": blocks, "width": width, "tokens": 256, "parameters": parameters},
        "measured": {
            "images": given.count,
            "peak_gb_with_weights": round(with_weights, 2),
            "peak_gb_images": round(passing, 2),
            "peak_gb_comparing": round(peak(), 2),
            "seconds_first_batch_with_compilation": round(compiled, 1),
            "seconds_per_batch": round(seconds, 1),
            "seconds_comparing": round(comparing, 1),
            "seconds_procrustes_of_a_pair": round(one_pair, 2),
        },
        "computed": {
            "images": given.num,
            "rows_kept_gb": round(kept, 2),
            "peak_gb": round(max(passing + kept, peak()), 2),
            "hours_per_checkpoint_and_time": round(seconds * given.num / given.batch / 3600, 2),
        },
        "versions": versions(),
    }
    print(json.dumps(record, indent=2))
    if given.out:
        write_json(Path(given.out), record)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/diversedit.py:xl2", "Config of the network.")
    flags.DEFINE_integer("count", 32, "Images to pass.")
    flags.DEFINE_integer("num", 2000, "Images to compute the result for.")
    flags.DEFINE_integer("batch", 8, "Images at a time.")
    flags.DEFINE_string("out", None, "JSON file to write.")
    cli.launch(main)
