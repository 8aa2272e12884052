"""Time sampling for variants of a config: one batch of `config.sampler.batch_size` from noise to the host.

Our sampler is one program. `--vs=torch` adds the config's sampler in PyTorch, a loop of compiled steps. `first s` is
the first batch, with compilation. A guided step evaluates the network twice per image, an unguided step once: guidance
in [0, 0.7] instead of always saves about 15%.
"""

import time
from functools import partial
from typing import Any

import numpy as np

from diversedit_jax import conditioning
from tools.benchmark import random_run, timing

COLUMNS = {"s a batch": ("s", 2), "ratio": ("ratio", 3), "images/s": ("images_per_s", 3), "first s": ("first_s", 1)}


def subject(run: random_run.Run) -> timing.Subject:
    """The sampler of a run, after its first batch."""
    labels = labels_of(run)
    work = partial(run.experiment.sampler(), run.params(), run.frozen, labels, 0)
    begin = time.perf_counter()
    work()
    facts = {"first_s": time.perf_counter() - begin, "batch_size": len(labels)}
    return timing.Subject(timing.clocked(work), 1, facts)


def labels_of(run: random_run.Run) -> np.ndarray:
    """The labels of a batch."""
    return conditioning.labels("balanced", run.config.sampler.batch_size, run.experiment.space.conditions.classes, 0)


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures and their table."""
    rows = random_run.compared(given, "sample", subject, lambda run: {"y": labels_of(run)}, 1)
    rows = [row | {"images_per_s": row["batch_size"] / row["s"]["median"]} for row in rows]
    return {"rows": rows}, timing.table_of(rows, COLUMNS)
