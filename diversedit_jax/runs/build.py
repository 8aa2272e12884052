"""From a config to the components of a run. What a config can have wrong is found here, before anything compiles."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from diversedit_jax import conditioning, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Codec, Condition, Conditions, Model, Params, Space
from diversedit_jax.codecs import network_space, with_encoders
from diversedit_jax.data import Dataset
from diversedit_jax.data.pipeline import stacked
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.registry import in_range
from diversedit_jax.runtime import flops
from diversedit_jax.sampling import sampler
from diversedit_jax.training import optimizer
from diversedit_jax.training.step import Components, train_step
from diversedit_jax.weights import dit as releases


class Experiment(NamedTuple):
    """A config, built for examples of `space`, as they are stored. rates: the learning rate at each step, by group."""

    config: ConfigDict
    space: Space
    layout: sharding.Layout
    components: Components
    rates: Mapping[str, optax.Schedule]

    def sampler(self) -> sampler.Sampler:
        """The sampler of the config."""
        options = configs.keywords(self.config.sampler, "config.sampler", sampler.make)
        return sampler.make(*self.sampled(), **options)

    def conditions(self, rule: str | None, num: int, seed: int) -> Condition:
        """The stored conditions of `num` samples, by a rule of `conditioning.RULES`."""
        held = partial(held_out, partial(open_data, self.config))
        return conditioning.chosen(rule, num, self.space.conditions, seed, held)

    def sampled(self) -> tuple:
        """What `sampler.make` needs besides its options."""
        parts = self.components
        return parts.model, parts.codec, self.space, parts.objective.predicts, self.layout


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


def held_out(data: Callable[[str], Dataset], num: int) -> Condition:
    """The conditions of the first `num` held-out examples, in turn if there are fewer.

    data: split -> data set. Without a test split training examples are taken.
    """
    try:
        source = data("test").source
    except RunError:
        source = data("train").source
    return stacked([source[number % len(source)]["y"] for number in range(num)])


def build(config: ConfigDict, space: Space, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """A run for stored examples of `space`. ConfigError for what cannot work.

    devices: of another machine, to compile for it; by default this one's.
    """
    layout = sharding.make(**config.mesh, devices=devices)
    _check_steps(config, layout)
    groups = {label: _group(label, group) for label, group in config.groups.items()}
    options = configs.keywords(config.optim, "config.optim", optimizer.make)
    transform, rates = optimizer.grouped(config.total_steps, options, groups)
    components = components_of(config, space, layout, transform)
    return Experiment(config, space, layout.with_rules(components.model.rules), components, rates)


def components_of(
    config: ConfigDict, space: Space, layout: sharding.Layout, transform: optax.GradientTransformation
) -> Components:
    """The components that a config names."""
    for label in {"objective", "total"} & set(config.losses):
        raise ConfigError(f"config.losses.{label}: the metrics use this name already; choose another label")
    losses = {label: configs.make("losses", c, f"config.losses.{label}") for label, c in config.losses.items()}
    objective = configs.make("objectives", config.objective, "config.objective")
    codec = configs.make("codecs", config.codec, "config.codec")
    inner = network_space(codec, space)
    encoders = {label: configs.make("encoders", c, f"config.encoders.{label}") for label, c in config.encoders.items()}
    codec = with_encoders(codec, encoders) if encoders else codec
    cuts = tuple(sorted({block for aux in losses.values() for block in aux.blocks}))
    with jax.set_mesh(layout.mesh):  # a network may ask where it will run
        model = configs.make("models", config.model, "config.model", inner, objective.inputs, cuts)
    null = space.conditions.null
    return Components(model, codec, objective, losses, transform, config.ema_decay, config.accumulate, null)


def _group(label: str, group: ConfigDict) -> dict[str, Any]:
    given = ConfigDict({name: value for name, value in group.items() if name != "of"})
    return configs.keywords(given, f"config.groups.{label}", optimizer.make) | {"of": group.of}


def _check_steps(config: ConfigDict, layout: sharding.Layout) -> None:
    for name in ("total_steps", "batch_size", "accumulate", "log_every"):
        in_range(f"config.{name}", config[name], 1)
    in_range("config.ema_decay", config.ema_decay, 0, below=1)
    in_range("config.max_skipped", config.max_skipped, 0)
    at_once = layout.shards * config.accumulate
    if config.batch_size % at_once:
        below = config.batch_size // at_once * at_once
        nearest = f"{below} or {below + at_once}" if below else f"{at_once}"
        times = f" x {config.accumulate} accumulated parts" if config.accumulate > 1 else ""
        raise ConfigError(
            f"config.batch_size = {config.batch_size} is not divisible by {layout.shards} (data x fsdp of config.mesh)"
            f"{times}; nearest: {nearest}"
        )


def work(experiment: Experiment, state: Any, batch: Any, again: bool = False) -> int:
    """The FLOPs of a training step on this state and batch, which may be abstract: see `runtime.flops`.

    again: with what rematerialisation computes again. Raises what tracing the step raises.
    """
    config = configs.copied(experiment.config)
    countable = {"attention": "xla", "unroll": False} | ({} if again else {"remat": "none"})
    config.model.update({name: form for name, form in countable.items() if name in config.model})
    parts = experiment.components
    with jax.set_mesh(experiment.layout.mesh):
        inner = network_space(parts.codec, experiment.space)
        model = configs.make("models", config.model, "config.model", inner, parts.objective.inputs, ())
    step = partial(train_step, parts._replace(model=model))
    return flops.of(step, state, jax.eval_shape(parts.codec.init), batch, jax.eval_shape(jax.random.key, 0))


def on_this_machine(config: ConfigDict) -> ConfigDict:
    """A copy of a config whose mesh fits the devices of this machine, however many trained the run."""
    config = configs.copied(config)
    given = {axis: config.mesh.get(axis, 1) for axis in ("fsdp", "tensor")}  # a run of an older version lacks some
    if min(given.values()) < 1 or jax.device_count() % math.prod(given.values()):
        given = {"fsdp": 1, "tensor": 1}
    config.mesh = ConfigDict({"data": -1, **given, "rules": config.mesh.get("rules", ())})
    return config


def abstract_params(model: Model, layout: sharding.Layout) -> Params:
    """The shapes of a model's parameters and where they live."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return sharding.placed(abstract, sharding.shardings(abstract, layout))


def frozen_weights(codec: Codec, layout: sharding.Layout) -> Any:
    """The frozen weights of a codec, put where they live. (A program that made them would hold a file.)"""
    frozen = jax.tree.map(np.asarray, codec.init())
    return sharding.put(frozen, sharding.shardings(frozen, layout))


def starting_params(config: ConfigDict, model: Model, wanted: Params) -> Params | None:
    """The parameters of the release in `config.init_from`, None if there is none.

    wanted: the shapes of the model's. The release may lack what `model.fresh` names, and nothing else.
    """
    source = config.init_from
    if source.file is None:
        return None
    release, _ = releases.open_release(Path(source.file), source.family, source.heads, source.weights)
    given, needed = (sharding.by_name(params) for params in (release.params, wanted))
    for name in sorted(given.keys() | needed.keys()):
        has, needs = (list(leaves[name].shape) if name in leaves else None for leaves in (given, needed))
        if has != needs and (has is not None or name.partition("/")[0] not in model.fresh):
            raise ConfigError(
                f"config.init_from: {source.file} does not fit config.model: {name} is {has or 'missing'} there, "
                f"{needs or 'unknown'} here"
            )
    return release.params


def sample_shape(codec: Codec, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of an image that is decoded from a sample of `shape`. None: samples are not decoded."""
    if codec.decode is None:
        return None
    frozen, x = jax.eval_shape(codec.init), jax.ShapeDtypeStruct((1, *shape), np.float32)
    return jax.eval_shape(codec.decode, frozen, x).shape[1:]


def best_by(config: ConfigDict) -> str | None:
    """The label of the evaluator by whose metric checkpoints are kept, or None. ConfigError if it is not there."""
    best, metric = in_range("config.checkpoint.best", config.checkpoint.best, 0), config.checkpoint.metric
    if not best:
        return None
    label = (metric or "").partition("/")[0]
    if label not in config.evaluators:
        known = ", ".join(config.evaluators) or "none"
        raise ConfigError(
            f"config.checkpoint.metric = {metric!r}: wanted LABEL/NAME of config.evaluators, known: {known}"
        )
    return label


def to_json(space: Space) -> dict[str, Any]:
    """A space as plain data, for a checkpoint: sampling then needs no data."""

    def plain(null: Any) -> Any:
        if isinstance(null, Mapping):
            return {name: plain(value) for name, value in null.items()}
        array = np.asarray(null)
        return [array.dtype.name, list(array.shape), array.ravel().tolist()]

    shape, (null, classes) = list(space.shape), space.conditions
    return {"shape": shape, "num_classes": classes} | ({"null": plain(null)} if classes is None else {})


def from_json(stored: Mapping[str, Any]) -> Space:
    """The inverse of `to_json`; also for checkpoints of versions that knew labels alone."""

    def array(null: Any) -> Any:
        if isinstance(null, Mapping):
            return {name: array(value) for name, value in null.items()}
        dtype, shape, values = null
        return np.array(values, dtype).reshape(shape)

    shape, classes = tuple(stored["shape"]), stored["num_classes"]
    return Space(shape, Conditions.labels(classes) if classes is not None else Conditions(array(stored["null"])))
