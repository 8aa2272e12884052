"""Parts that tests put into a run by dotted path, such as `tests.parts:make_terminate`."""

import os
import resource
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diversedit_jax.api import AuxLoss, Term
from diversedit_jax.runtime import loggers


def make_terminate(spec, *, marker: str):
    """An evaluator of three batches of samples. The first time it runs, it asks the program to stop before them."""

    def run(current):
        if not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return [("drawn", len(current(spec.conditions(None, 3 * spec.batch, 0))))]

    return run


def make_full(spec, *, limit: int):
    """An evaluator after which no file of this process can grow beyond `limit` bytes, as on a full disk."""

    def run(current):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return []

    return run


def make_rated(spec, *, values: tuple[float, ...]):
    """An evaluator whose `value` at each run is the next of these; no sample is drawn."""
    left = iter(values)
    return lambda sample: [("value", next(left))]


def make_pictured(spec, *, side: int):
    """An evaluator that looks at the network: the number of its parameters, and a picture."""

    def run(current):
        yield "parameters", float(sum(x.size for x in jax.tree.leaves(current.learned["params"])))
        yield "picture", np.full((side, side, 3), 7, np.uint8)

    return run


def make_poisoned(*, at: int, last: int = 10**9):
    """An auxiliary loss that is NaN from step `at` to step `last` (steps counted from 1)."""

    def apply(forward, batch, context):
        number = context.step + 1
        return Term(jnp.where((number >= at) & (number <= last), jnp.nan, 0.0))

    return AuxLoss(apply)


def make_aligned(*, label: str):
    """An auxiliary loss that reads the features of a frozen encoder."""

    def apply(forward, batch, context):
        features, token = batch[f"features/{label}"], batch[f"token/{label}"]
        return Term(jnp.mean(forward.features[1]) * jnp.mean(features * token[:, None]))

    return AuxLoss(apply, blocks=(1,), reads=(f"features/{label}", f"token/{label}"))


def make_since(*, at: int):
    """An auxiliary loss that is the objective from step `at` on, and 0 before."""

    def apply(forward, batch, context):
        return Term(jnp.where(context.step >= at, 1.0, 0.0) * forward.loss.mean())

    return AuxLoss(apply)


def make_twice(*, sign: float = 1.0):
    """An auxiliary loss that is the objective itself, twice, or its opposite."""

    def apply(forward, batch, context):
        return Term(2 * sign * forward.loss.mean())

    return AuxLoss(apply)


class Tracker:
    """A tracker in memory. broken: what it fails at."""

    made, broken = [], ()

    def __init__(self, config, workdir, known):
        self._try("start")
        self.id, self.place, self.known, self.config = known or f"id{len(self.made)}", "here", known, config
        self.written, self.end = [], None
        self.made.append(self)

    def _try(self, what):
        if what in self.broken:
            raise RuntimeError("the server is away")

    def scalars(self, step, values):
        self._try("scalars")
        self.written.append((step, dict(values)))

    def images(self, step, images):
        self._try("images")
        self.written.append((step, {name: image.shape for name, image in images.items()}))

    def close(self, end):
        self._try("close")
        self.end = end


def logged(monkeypatch, name: str) -> type[Tracker]:
    """Let `name` of config.loggers be a new kind of tracker in memory, which counts as installed."""
    kind = type("Logged", (Tracker,), {"made": []})
    monkeypatch.setitem(loggers.KINDS, name, kind)
    monkeypatch.setattr(loggers, "check_installed", lambda text: None)
    return kind
