"""From a config to the parts of a run. Whatever a config can have wrong is found here, before anything compiles."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import optim, sampling, sharding
from diversedit_jax.api import Params, Prepare
from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError
from diversedit_jax.interop import releases
from diversedit_jax.models import Model
from diversedit_jax.prepare import with_encoders
from diversedit_jax.train_state import Parts


class Experiment(NamedTuple):
    """A config, built."""

    mesh: Mesh
    parts: Parts
    sample: sampling.Sample
    rate: optax.Schedule


def open_data(config: ConfigDict, split: str = "train") -> Dataset:
    """The data set of a config. ConfigError where its latents are of another scale than `config.prepare` takes."""
    dataset = configs.make("data", config.data, "config.data", split)
    scale = config.prepare.get("scale", dataset.scale)
    if dataset.scale not in (None, scale):
        raise ConfigError(
            f"config.prepare.scale = {scale}, but the autoencoder of these latents has {dataset.scale}: "
            f"set --config.prepare.scale={dataset.scale}"
        )
    return dataset


def build(config: ConfigDict, shape: tuple[int, int, int], num_classes: int) -> Experiment:
    """The parts of a run for samples of `shape` and labels 0 .. num_classes - 1; ConfigError for what cannot work."""
    mesh = sharding.make_mesh(**config.mesh)
    _check_steps(config)
    for label in {"objective", "total"} & set(config.losses):
        raise ConfigError(f"config.losses.{label}: the metrics use this name already; choose another label")
    losses = {label: configs.make("losses", c, f"config.losses.{label}") for label, c in config.losses.items()}
    cuts = sorted({block for aux in losses.values() for block in aux.blocks})
    optimizer, rate = optim.make(config.total_steps, **configs.keywords(config.optim, "config.optim", optim.make))
    model = configs.make("models", config.model, "config.model", shape, num_classes, cuts)
    objective = configs.make("objectives", config.objective, "config.objective", num_classes)
    prepare = configs.make("prepare", config.prepare, "config.prepare")
    encoders = {label: configs.make("encoders", c, f"config.encoders.{label}") for label, c in config.encoders.items()}
    prepare = with_encoders(prepare, encoders) if encoders else prepare
    parts = Parts(model, prepare, objective, losses, optimizer, config.ema_decay, config.accumulate)
    sampler = configs.keywords(config.sampler, "config.sampler", sampling.make)
    source = sampling.trained(config.objective.to_dict())
    _check_times(config, isinstance(source, sampling.AverageVelocity))
    sample = sampling.make(model, prepare, shape, num_classes, source, mesh, **sampler)
    return Experiment(mesh, parts, sample, rate)


def _check_times(config: ConfigDict, average: bool) -> None:
    """The objective and the model are both of one time or both of two, where the model's options tell."""
    if config.model.get("second_time", average) != average:
        times = "two times" if average else "one time"
        raise ConfigError(
            f"config.objective.name = {config.objective.name!r} needs a network of {times}: "
            f"set config.model.second_time = {average}"
        )


def _check_steps(config: ConfigDict) -> None:
    for name in ("total_steps", "batch_size", "accumulate", "log_every"):
        if config[name] < 1:
            raise ConfigError(f"config.{name} = {config[name]}: must be positive")
    if not 0 <= config.ema_decay < 1:
        raise ConfigError(f"config.ema_decay = {config.ema_decay}: must be in [0, 1)")
    at_once = jax.device_count() * config.accumulate
    if config.batch_size % at_once:
        below = config.batch_size // at_once * at_once
        nearest = f"{below} or {below + at_once}" if below else f"{at_once}"
        times = f" x {config.accumulate} accumulated parts" if config.accumulate > 1 else ""
        raise ConfigError(
            f"config.batch_size = {config.batch_size} is not divisible by {jax.device_count()} devices{times}; "
            f"nearest: {nearest}"
        )


def abstract_params(model: Model, mesh: Mesh) -> Params:
    """The shapes of a model's parameters and where they live."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return sharding.placed(abstract, sharding.shardings(abstract, mesh))


def prepared(prepare: Prepare, mesh: Mesh) -> Any:
    """The frozen weights of a preparation, put where they live. (A program that made them would hold a file.)"""
    frozen = jax.tree.map(np.asarray, prepare.init())

    def put(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, frozen, sharding.shardings(frozen, mesh))


def starting_params(config: ConfigDict, wanted: Params) -> Params | None:
    """The parameters of the release in `config.init_from`, None if there is none.

    `wanted` holds the shapes of the model's. The release may lack the long residual connections, nothing else.
    """
    source = config.init_from
    if source.file is None:
        return None
    release, _ = releases.open_release(Path(source.file), source.family, source.heads, source.weights)
    given, needed = (configs.flat(params) for params in (release.params, wanted))
    for name in sorted(given.keys() | needed.keys()):
        has, needs = (list(leaves[name].shape) if name in leaves else None for leaves in (given, needed))
        if has != needs and (has is not None or not name.startswith("merges.")):
            raise ConfigError(
                f"config.init_from: {source.file} does not fit config.model: {name} is {has or 'missing'} there, "
                f"{needs or 'unknown'} here"
            )
    return release.params


def evaluator(config: ConfigDict, label: str):
    """The evaluator `label` of a config."""
    return configs.make("evaluators", config.evaluators[label], f"config.evaluators.{label}")
