"""Sampling, of variants of a config in turn: one batch of `config.sampler.batch_size` from noise to the host, by the
whole sampler in one program. `--vs=torch` adds the config's sampler in PyTorch, a loop of compiled steps.

`first s` is the first batch, with compilation. An image that is guided at a step costs two evaluations of the network
there, one that is not costs one: guidance in [0, 0.7] instead of always saves about 15%.
"""

import contextlib
import time
from functools import partial
from typing import Any

import numpy as np

from diversedit_jax import conditioning
from tools.benchmark import random_run, timing, variants
from tools.benchmark.timing import spread_of


def subject(run: random_run.Run) -> timing.Subject:
    """The sampler of a run, after its first batch."""
    labels = labels_of(run)
    work = partial(run.experiment.sampler(), run.params(), run.frozen, labels, 0)
    begin = time.perf_counter()
    work()
    facts = {"first_s": time.perf_counter() - begin}
    return timing.Subject(timing.clocked(work), 1, facts | {"batch_size": len(labels)})


def labels_of(run: random_run.Run) -> np.ndarray:
    """The labels of a batch."""
    return conditioning.labels("balanced", run.config.sampler.batch_size, run.experiment.space.conditions.classes, 0)


def torch_subject(run: random_run.Run, stack: contextlib.ExitStack) -> tuple[str, timing.Subject]:
    """The same sampler in PyTorch, after its first batch, and its name."""
    labels = labels_of(run)
    begin = time.perf_counter()
    twin = stack.enter_context(random_run.in_torch(run, "sample", {"y": labels}))
    facts = twin.facts | {"first_s": time.perf_counter() - begin, "batch_size": len(labels)}
    return random_run.torch_name(twin), timing.Subject(partial(twin.run, 1), 1, facts)


def table(rows: timing.Rows) -> str:
    """The rows of a record for a person."""
    lines = [
        [
            found["name"],
            spread_of(found["s"], 2),
            spread_of(found["ratio"], 3),
            timing.number(found["images_per_s"], 3),
            timing.number(found["first_s"], 1),
        ]
        for found in rows
    ]
    return timing.table(("", "s a batch", "ratio", "images/s", "first s"), lines)


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures of a benchmark with these flags, and their table."""
    subjects: dict[str, timing.Subject] = {}
    with contextlib.ExitStack() as stack:
        for name, config in variants.of_flags().items():
            timing.say(f"first batch of {name}")
            run = random_run.make(config)
            subjects[name] = subject(run)
            if given.vs and len(subjects) == 1:
                theirs, one = torch_subject(run, stack)
                subjects[theirs] = one
        rows = timing.measured(subjects, given.rounds)
    rows = [row | {"images_per_s": row["batch_size"] / row["s"]["median"]} for row in rows]
    return {"rows": rows}, table(rows)
