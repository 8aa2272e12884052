"""The run of a config with random weights and data in place of its own, for benchmarks.

Weights are those of a new run, and noise: without it adaLN-Zero would let most of a network compute zeros, which some
hardware does faster, and no gradient would pass.
"""

import contextlib
import os
import tempfile
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
from tools.benchmark import stand_ins, torch_twin
from tools.benchmark.timing import say

NOISE = 0.02  # standard deviation of what is added to each weight


class Run(NamedTuple):
    """A config, built on the devices of this machine."""

    experiment: Experiment
    init: Callable[[jax.Array], State]
    frozen: Any
    batch: dict[str, jax.Array]

    @property
    def config(self) -> ConfigDict:
        """What was built."""
        return self.experiment.config

    @property
    def shardings(self) -> Any:
        """Where the state lives."""
        return sharding.shardings(jax.eval_shape(self.init, jax.random.key(0)), self.experiment.layout)

    def work(self) -> int:
        """The FLOPs of a training step. ConfigError where it cannot be traced."""
        with traced():
            return build.work(self.experiment, jax.eval_shape(self.init, jax.random.key(0)), self.batch)

    def state(self) -> State:
        """A training state, made anew at each call."""
        return jax.jit(self.init, out_shardings=self.shardings)(jax.random.key(0))

    def params(self) -> Any:
        """The parameters of such a state, alone."""
        return jax.jit(lambda key: self.init(key)["params"], out_shardings=self.shardings["params"])(jax.random.key(0))


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Within it, what tracing raises is a ConfigError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config cannot be traced: {error}") from error


def make(config: ConfigDict) -> Run:
    """The run of a config; ConfigError for what cannot work."""
    config = configs.copied(config)
    space = stand_ins.space(config)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        fill = partial(_noise, rng)
        stand_ins.take_their_places(config, Path(folder), say, fill)
        built = build.build(config, space)
        frozen = build.frozen_weights(built.components.codec, built.layout)
    stored = jax.tree.map(partial(_values, rng, space.conditions.classes), stand_ins.stored(config, space))
    batch = jax.device_put(stored, sharding.over_batch(built.layout))
    new = initializer(built.components, batch)

    def init(key: jax.Array) -> State:
        state = new(key)
        trained = {name: state[name] for name in TRAINED}
        leaves, structure = jax.tree.flatten(trained)
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
    """Random values for an array of a stored batch: labels, bytes of images, moments (standard deviations too) or x."""
    if like.dtype == np.int32:
        return rng.integers(max(classes or 1, 1), size=like.shape, dtype=like.dtype)
    if like.dtype == np.uint8:
        return rng.integers(256, size=like.shape, dtype=like.dtype)
    return np.abs(rng.standard_normal(like.shape, np.float32)).astype(like.dtype)


def in_torch(run: Run, kind: str, batch: Mapping[str, Any]) -> torch_twin.Twin:
    """A run's training step or sampler, kind `train` or `sample`, in PyTorch: with the same weights, on the same kind
    of device, with as many threads as there are cores."""
    say("compiling PyTorch's")
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    batch = {name: np.asarray(values) for name, values in batch.items()}
    job = torch_twin.job_of(run.experiment, run.params(), batch, kind, device=device, threads=os.cpu_count())
    twin = torch_twin.Twin(job)
    if not twin.facts["compile"]:
        say(f"torch.compile does not work here: {twin.facts['why_not']}")
    return twin


def torch_name(twin: torch_twin.Twin) -> str:
    """What a table calls it."""
    return f"PyTorch {twin.facts['torch']}, {'compiled' if twin.facts['compile'] else 'eager'}"
