"""The run of a config with random weights and data, for benchmarks.

The weights are those of a new run plus noise. Without noise adaLN-Zero makes most of a network compute zeros: some
hardware does that faster, and no gradient passes.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import sharding
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build
from diversedit_jax.runs.build import Experiment
from diversedit_jax.training.step import TRAINED, State, initializer
from tools.benchmark import stand_ins, timing, variants
from tools.benchmark.timing import Subject, say
from tools.benchmark.torch_twin import Twin, job_of

NOISE = 0.02  # standard deviation of the noise on each weight


class Run(NamedTuple):
    """A config, built on the devices of this machine."""

    experiment: Experiment
    init: Callable[[jax.Array], State]
    frozen: Any
    batch: dict[str, jax.Array]

    @property
    def config(self) -> ConfigDict:
        """The config with its stand-ins."""
        return self.experiment.config

    @property
    def shardings(self) -> Any:
        """The shardings of the state."""
        return sharding.shardings(jax.eval_shape(self.init, jax.random.key(0)), self.experiment.layout)

    def work(self) -> int:
        """The FLOPs of a training step."""
        with traced():
            return build.work(self.experiment, jax.eval_shape(self.init, jax.random.key(0)), self.batch)

    def state(self) -> State:
        """A new training state."""
        return jax.jit(self.init, out_shardings=self.shardings)(jax.random.key(0))

    def params(self) -> Any:
        """The parameters of a new training state."""
        return jax.jit(lambda key: self.init(key)["params"], out_shardings=self.shardings["params"])(jax.random.key(0))


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Turn errors of tracing into ConfigError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config cannot be traced: {error}") from error


def make(config: ConfigDict) -> Run:
    """The run of a config. ConfigError if the config cannot work."""
    config = configs.copied(config)
    space = stand_ins.space(config)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        stand_ins.replace_files(config, Path(folder), partial(_noise, rng))
        built = build.build(config, space)
        frozen = build.frozen_weights(built.components.codec, built.layout)
    stored = jax.tree.map(partial(_values, rng, space.conditions.classes), stand_ins.stored(config, space))
    batch = jax.device_put(stored, sharding.over_batch(built.layout))
    new = initializer(built.components, batch)

    def init(key: jax.Array) -> State:
        state = new(key)
        leaves, structure = jax.tree.flatten({name: state[name] for name in TRAINED})
        noisy = [
            leaf + NOISE * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        trained = jax.tree.unflatten(structure, noisy)
        return state | trained | {"ema": jax.tree.map(jnp.copy, trained["params"])}

    return Run(built, init, frozen, batch)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], dtype) -> np.ndarray:
    return (NOISE * rng.standard_normal(shape, np.float32)).astype(dtype)


def _values(rng: np.random.Generator, classes: int | None, like: jax.ShapeDtypeStruct) -> np.ndarray:
    """Random labels, images, or moments and x: these are not negative, because moments hold standard deviations."""
    if like.dtype in (np.int32, np.uint8):
        return rng.integers(256 if like.dtype == np.uint8 else classes or 1, size=like.shape, dtype=like.dtype)
    return np.abs(rng.standard_normal(like.shape, np.float32)).astype(like.dtype)


def compared(
    given: Any, kind: str, subject: Callable[[Run], Subject], batch: Callable[[Run], Mapping], steps: int | None
) -> list[dict[str, Any]]:
    """Timed rows for --config and each --compare, and with --vs=torch for the config in PyTorch, behind the first.

    kind: `train` or `sample`. subject: what is timed of a run. batch: the twin's, see `job_of`. steps: of one timing.
    PyTorch gets the same weights and kind of device, and as many threads as there are cores.
    """
    subjects: dict[str, Subject] = {}
    with contextlib.ExitStack() as stack:
        for name, config in variants.of_flags().items():
            say(f"compiling {name}")
            run = make(config)
            subjects[name] = subject(run)
            if given.vs and len(subjects) == 1:
                say("compiling PyTorch's")
                begin = time.perf_counter()
                device = "cuda" if jax.default_backend() == "gpu" else "cpu"
                arrays = {key: np.asarray(values) for key, values in batch(run).items()}
                job = job_of(run.experiment, run.params(), arrays, kind, device=device, threads=os.cpu_count())
                twin = stack.enter_context(Twin(job))
                facts = twin.facts | ({"first_s": time.perf_counter() - begin} if kind == "sample" else {})
                facts["batch_size"] = len(arrays["y"])
                if not facts["compile"]:
                    say(f"torch.compile does not work here: {facts['why_not']}")
                theirs = f"PyTorch {facts['torch']}, {'compiled' if facts['compile'] else 'eager'}"
                subjects[theirs] = Subject(*timing.counted(twin.run, steps), facts)
        rows = timing.measured(subjects, given.rounds)
        if given.vs and kind == "train" and (held := twin.peak_bytes()):
            rows[1]["peak_gib"] = held / 2**30
    return rows
