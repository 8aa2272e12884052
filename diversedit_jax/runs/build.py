"""From a config to the parts of a run. Whatever a config can have wrong is found here, before anything compiles."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import sharding
from diversedit_jax.api import Codec, Params
from diversedit_jax.codecs import with_encoders
from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Model
from diversedit_jax.runtime import flops
from diversedit_jax.sampling import sampler as sampling
from diversedit_jax.training import optimizer as optim
from diversedit_jax.training.step import Parts, train_step
from diversedit_jax.weights import dit as releases


class Experiment(NamedTuple):
    """A config, built."""

    layout: sharding.Layout
    parts: Parts
    sample: sampling.Sample
    rate: optax.Schedule


def open_data(config: ConfigDict, split: str = "train") -> Dataset:
    """The data set of a config. ConfigError where its latents are of another scale than `config.codec` takes."""
    dataset = configs.make("data", config.data, "config.data", split)
    scale = config.codec.get("scale", dataset.scale)
    if dataset.scale not in (None, scale):
        raise ConfigError(
            f"config.codec.scale = {scale}, but the autoencoder of these latents has {dataset.scale}: "
            f"set --config.codec.scale={dataset.scale}"
        )
    return dataset


def build(
    config: ConfigDict, shape: tuple[int, int, int], num_classes: int, devices: Sequence[jax.Device] | None = None
) -> Experiment:
    """The parts of a run for samples of `shape` and labels 0 .. num_classes - 1; ConfigError for what cannot work.

    devices: of another machine, to compile for it; by default this one's.
    """
    layout = sharding.make(**config.mesh, devices=devices)
    _check_steps(config, layout)
    for label in {"objective", "total"} & set(config.losses):
        raise ConfigError(f"config.losses.{label}: the metrics use this name already; choose another label")
    losses = {label: configs.make("losses", c, f"config.losses.{label}") for label, c in config.losses.items()}
    cuts = sorted({block for aux in losses.values() for block in aux.blocks})
    optimizer, rate = optim.make(config.total_steps, **configs.keywords(config.optim, "config.optim", optim.make))
    with jax.set_mesh(layout.mesh):  # a network may ask where it will run
        model = configs.make("models", config.model, "config.model", shape, num_classes, cuts)
    objective = configs.make("objectives", config.objective, "config.objective", num_classes)
    codec = configs.make("codecs", config.codec, "config.codec")
    encoders = {label: configs.make("encoders", c, f"config.encoders.{label}") for label, c in config.encoders.items()}
    codec = with_encoders(codec, encoders) if encoders else codec
    parts = Parts(model, codec, objective, losses, optimizer, config.ema_decay, config.accumulate)
    options = configs.keywords(config.sampler, "config.sampler", sampling.make)
    sample = sampler(config, layout, parts, shape, num_classes)(**options)
    return Experiment(layout, parts, sample, rate)


def work(
    config: ConfigDict,
    parts: Parts,
    shape: tuple[int, int, int],
    num_classes: int,
    state: Any,
    batch: Any,
    again: bool = False,
) -> int:
    """The FLOPs of a training step on this state and batch, which may be abstract: see `flops`.

    again: with what rematerialisation computes again. Raises what tracing the step raises.
    """
    plain = configs.copied(config.model)
    countable = {"attention": "xla", "unroll": False} | ({} if again else {"remat": "none"})
    plain.update({name: form for name, form in countable.items() if name in plain})
    parts = parts._replace(model=configs.make("models", plain, "config.model", shape, num_classes))
    frozen = jax.eval_shape(parts.codec.init)
    return flops.of(partial(train_step, parts), state, frozen, batch, jax.eval_shape(jax.random.key, 0))


def elsewhere(config: ConfigDict) -> ConfigDict:
    """The config of a run for looking at it on these devices, however many trained it: a copy with a mesh that fits."""
    config = configs.copied(config)
    given = {axis: config.mesh.get(axis, 1) for axis in ("fsdp", "tensor")}  # a run of an older version lacks some
    if min(given.values()) < 1 or jax.device_count() % math.prod(given.values()):
        given = {"fsdp": 1, "tensor": 1}
    config.mesh = ConfigDict({"data": -1, **given, "rules": config.mesh.get("rules", ())})
    return config


def sampler(
    config: ConfigDict, layout: sharding.Layout, parts: Parts, shape: tuple[int, int, int], num_classes: int
) -> Callable[..., sampling.Sample]:
    """From the options of a sampler to a function that samples what the config trains."""
    source = sampling.trained(config.objective.to_dict())
    _check_times(config, isinstance(source, sampling.AverageVelocity))
    return partial(sampling.make, parts.model, parts.codec, shape, num_classes, source, layout)


def _check_times(config: ConfigDict, average: bool) -> None:
    """The objective and the model are both of one time or both of two, where the model's options tell."""
    if config.model.get("second_time", average) != average:
        times = "two times" if average else "one time"
        raise ConfigError(
            f"config.objective.name = {config.objective.name!r} needs a network of {times}: "
            f"set config.model.second_time = {average}"
        )


def _check_steps(config: ConfigDict, layout: sharding.Layout) -> None:
    for name in ("total_steps", "batch_size", "accumulate", "log_every"):
        if config[name] < 1:
            raise ConfigError(f"config.{name} = {config[name]}: must be positive")
    if not 0 <= config.ema_decay < 1:
        raise ConfigError(f"config.ema_decay = {config.ema_decay}: must be in [0, 1)")
    at_once = layout.shards * config.accumulate
    if config.batch_size % at_once:
        below = config.batch_size // at_once * at_once
        nearest = f"{below} or {below + at_once}" if below else f"{at_once}"
        times = f" x {config.accumulate} accumulated parts" if config.accumulate > 1 else ""
        raise ConfigError(
            f"config.batch_size = {config.batch_size} is not divisible by {layout.shards} (data x fsdp of config.mesh)"
            f"{times}; nearest: {nearest}"
        )


def abstract_params(model: Model, layout: sharding.Layout) -> Params:
    """The shapes of a model's parameters and where they live."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return sharding.placed(abstract, sharding.shardings(abstract, layout))


def prepared(codec: Codec, layout: sharding.Layout) -> Any:
    """The frozen weights of a preparation, put where they live. (A program that made them would hold a file.)"""
    frozen = codec.init()
    return sharding.put(frozen, sharding.shardings(jax.tree.map(np.asarray, frozen), layout))


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


def image_shape(codec: Codec, shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """The shape of an image that is decoded from a sample of `shape`; None where samples stay latents."""
    if codec.decode is None:
        return None
    frozen, x = jax.eval_shape(codec.init), jax.ShapeDtypeStruct((1, *shape), np.float32)
    return jax.eval_shape(codec.decode, frozen, x).shape[1:]


def best_by(config: ConfigDict) -> str | None:
    """The label of the evaluator by whose metric checkpoints are kept, or None; ConfigError if it is not there."""
    best, metric = config.checkpoint.best, config.checkpoint.metric
    if best < 0 or (best and not metric):
        raise ConfigError(f"config.checkpoint.best = {best}: wanted a count, and config.checkpoint.metric=LABEL/NAME")
    if not best:
        return None
    label = metric.partition("/")[0]
    if label not in config.evaluators:
        known = ", ".join(config.evaluators) or "none"
        raise ConfigError(
            f"config.checkpoint.metric = {metric!r}: wanted LABEL/NAME of config.evaluators, known: {known}"
        )
    return label


def evaluators(config: ConfigDict, parts: Parts, shape: tuple[int, int, int], num_classes: int) -> dict[str, Callable]:
    """The evaluators of a config, by label."""
    batch = sharding.filled(config.sampler.batch_size)
    drawn = sampling.Drawn(image_shape(parts.codec, shape), num_classes, batch, shape, config)
    return {
        label: configs.make("evaluators", slot, f"config.evaluators.{label}", drawn)
        for label, slot in config.evaluators.items()
    }
