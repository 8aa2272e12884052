"""Trained networks: runs and public releases, opened in one way for sampling, evaluation and analysis.

found = of_run("runs/mine")
source = drawing(found, overrides={"cfg_scale": 1.8})
images = source.sampler(source.params, source.frozen, source.conditions("balanced", 16, seed=0), seed=0)
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import sharding
from diversedit_jax.api import Condition, Conditions, Params, Space
from diversedit_jax.config import slot
from diversedit_jax.data import Dataset
from diversedit_jax.data.pipeline import stacked
from diversedit_jax.diffusion import solve
from diversedit_jax.errors import CheckpointError, ConfigError, RunError, WeightsError
from diversedit_jax.registry import one_of
from diversedit_jax.runs import build, exported
from diversedit_jax.runs.check import check
from diversedit_jax.sampling import sampler
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.checksums import checksums
from diversedit_jax.training.step import initializer
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights import hub
from diversedit_jax.weights.formats import weights_folder
from diversedit_jax.weights.vae import open_vae

WEIGHTS = {"ema": "ema", "online": "params"}  # which weights, and their entry in a checkpoint
IMAGENET = 1000  # its classes


class Trained(NamedTuple):
    """A trained network at one checkpoint or several, and what it was trained with.

    label:      for people. In an analysis, networks with the same label are seeds of one setting.
    experiment: its components, on the devices of this machine.
    steps:      of its checkpoints, in order; (0,) of a release.
    load:       (step, one of WEIGHTS) -> parameters of the network.
    trained:    step -> {"losses", "objective", "memory"}: what the losses and the objective have learned.
    data:       split -> data set.
    workdir:    of a run; None for a release.
    folder:     where samples and reports go by default.
    about:      what it is, for records.
    notes:      what could not be opened, in words.
    """

    label: str
    experiment: build.Experiment
    steps: tuple[int, ...]
    load: Callable[[int, str], Params]
    trained: Callable[[int], dict[str, Any]]
    data: Callable[[str], Dataset]
    workdir: Path | None
    folder: Path
    about: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> int:
        """The step of its last checkpoint. CheckpointError if it has none."""
        if not self.steps:
            raise CheckpointError(f"no checkpoint in {self.workdir}")
        return self.steps[-1]

    @property
    def space(self) -> Space:
        """Where its stored examples live."""
        return self.experiment.space


def of_run(
    workdir: str | Path,
    *,
    data: Mapping[str, Any] | ConfigDict | None = None,
    vae: str | None = None,
    rounding: str | None = None,
    text_encoder: str | None = None,
    model: Mapping[str, Any] | None = None,
    losses: bool = False,
    trust: bool = False,
) -> Trained:
    """The run in `workdir`.

    workdir:       of a run; or a folder to publish (`runs.exported`), also by its name on the hub (`weights.hub`).
    data:          a slot of `data` instead of config.data. vae, rounding: instead of those of config.codec.
    text_encoder:  the file of the text encoder, instead of config.text_encoder.file.
    model:         changes to config.model; options that it does not have are ignored.
    losses:        also build the losses and open the frozen encoders, for analysis. If an encoder cannot be opened, the
                   losses that read it are left out.
    trust:         run code outside this package that the stored config names, see `config.load`.
    """
    given, workdir = workdir, hub.local(workdir).absolute()
    published = exported.holds(workdir)
    losses = losses and not published  # what losses have learned is not there
    parts = [part for part in build.BUILT if losses or part not in configs.LABELED]
    config = configs.load(workdir, [*parts, *(["data"] if data is None else [])], trust=trust)
    check(config, parts)
    config = build.on_this_machine(config)
    if data is not None:
        config.data = ConfigDict(data)
    for option, value in _given(vae=vae, rounding=rounding).items():
        if option not in config.codec:
            raise ConfigError(f"--{option}={value}: the codec {config.codec.name} of {workdir} has no such option")
        config.codec[option] = value
    if text_encoder is not None:
        if config.text_encoder is None or "file" not in config.text_encoder:
            has = "was trained without texts" if config.text_encoder is None else "has one that comes with the package"
            raise ConfigError(f"--text_encoder={text_encoder}: {workdir} {has}")
        config.text_encoder.file = text_encoder
    config.model.update({option: value for option, value in (model or {}).items() if option in config.model})
    checkpoints = exported.Exported(workdir) if published else Checkpoints(workdir / "checkpoints")
    space, notes = build.from_json(checkpoints.meta()), []
    try:
        experiment = build.build(config, space)
    except RunError as error:
        if not config.encoders:
            raise
        experiment = build.build(without_encoders(config), space)
        if experiment.components.objective.reads:
            raise
        notes.append(f"its encoders are left out ({error}), and with them the losses that read them")
    parts, layout = experiment.components, experiment.layout

    def opened(split: str) -> Dataset:
        return fitting(build.open_data(config, split), config.data.name, space)

    def load(step: int, weights: str = "ema") -> Params:
        entry = WEIGHTS[one_of("weights", weights, WEIGHTS)]
        return checkpoints.restore_part(build.abstract_params(parts.model, layout), entry, step)[0]

    def trained(step: int) -> dict[str, Any]:
        if published:
            return {}
        example = jax.tree.map(jnp.asarray, stacked([opened("train").source[0]]))
        state = jax.eval_shape(initializer(parts, example), jax.random.key(0))
        found = {}
        for entry in ("losses", "objective", "memory"):
            wanted = sharding.placed(state[entry], sharding.shardings(state[entry], layout))
            stored = jax.tree.leaves(wanted)
            found[entry] = checkpoints.restore_part(wanted, entry, step)[0] if stored else wanted
        return found

    about = {"kind": "run", "model": config.model.to_dict(), "losses": config.losses.to_dict()}
    about |= {"weights": {"ema_decay": config.ema_decay}}
    steps = tuple(checkpoints.steps())
    name = str(given) if hub.on_hub(given) else workdir.name
    return Trained(name, experiment, steps, load, trained, opened, workdir, hub.place(given), about, tuple(notes))


def fitting(dataset: Dataset, name: str, space: Space) -> Dataset:
    """`dataset`, if a network that was trained in `space` can take its examples. ConfigError if not."""
    given = dataset.space
    if given.shape != space.shape:
        raise ConfigError(f"data {name!r}: its shape is {given.shape}, the network takes {space.shape}")
    if (given.conditions.classes is None) != (space.conditions.classes is None):
        raise ConfigError(f"data {name!r}: its conditions are of another kind than those of the network")
    has, takes = (jax.tree.map(np.shape, one.conditions.null) for one in (given, space))
    if has != takes:
        raise ConfigError(f"data {name!r}: its conditions have shape {has}, the network takes {takes}")
    if (given.conditions.classes or 0) > (known := space.conditions.classes or 0):
        raise ConfigError(f"data {name!r}: it has {given.conditions.classes} classes, the network knows {known}")
    return dataset


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def without_encoders(config: ConfigDict) -> ConfigDict:
    """A copy of a config without its frozen encoders and the losses that read them."""
    config = configs.copied(config)
    given = {f"{kind}/{label}" for label in config.encoders for kind in ("features", "token")}
    reads = {label: configs.make("losses", c, f"config.losses.{label}").reads for label, c in config.losses.items()}
    config.losses = ConfigDict({label: c for label, c in config.losses.items() if not given & set(reads[label])})
    config.encoders = ConfigDict()
    return config


def of_release(
    file: str | Path,
    family: str | None = None,
    heads: int | None = None,
    weights: str | None = None,
    sides: int | Sequence[int] | None = None,
    *,
    data: Mapping[str, Any] | ConfigDict | None = None,
    vae: str | None = None,
    rounding: str | None = None,
    text_encoder: str | None = None,
    model: Mapping[str, Any] | None = None,
) -> Trained:
    """The release in a weight file, see `weights.dit.open_release`.

    file:  also a name on the hub, see `weights.hub`.
    sides: height and width of its latents, or one number for both. None: as the file stores them.
    data: a slot of `data` to show it, for analysis. vae: the autoencoder that decodes its latents.
    rounding: of the decoded images.
    model: changes to the options of its network; options that it does not have are ignored.
    text_encoder: the file of the text encoder, with its tokenizer, of a network that takes texts.
    """
    name, place = str(file) if hub.on_hub(file) else Path(file).name, hub.place(file)
    file = hub.local(file).absolute()
    release, _ = releases.open_release(file, family, heads, weights)
    check_null_label(file, release)
    release = release.sized(tuple(np.resize(sides, 2).tolist()) if sides else None)
    sides = release.sides
    if sides is None:
        raise ConfigError(f"{file} does not store the size of its latents: give it with --side=N or --side=H,W")
    if data is not None and data["name"] in ("digits", "images", "synthetic"):
        codec = slot("codecs", "pixels", **_given(rounding=rounding))
    else:
        codec = slot("codecs", "vae", scale=release.scale, **_given(vae=vae, rounding=rounding))
    config = ConfigDict({"data": dict(data or {}), "encoders": {}, "losses": {}, "ema_decay": 0.0, "accumulate": 1})
    config.codec, config.objective = codec, slot("objectives", **release.objective)
    config.model = slot("models", **release.model)
    config.model.update({option: value for option, value in (model or {}).items() if option in config.model})
    config.sampler, config.text_encoder = configs.options(sampler.make), None
    layout = sharding.make()
    if release.arch.num_classes is not None:
        space = release.space(sides)
    elif text_encoder is None:
        raise ConfigError(f"{name} takes texts: give the text encoder, with its tokenizer: --text_encoder=FILE")
    else:
        pooled = release.arch.pooled is not None
        config.text_encoder = slot("encoders", "clip_text", file=text_encoder, pooled=pooled)
        (empty,), _ = build.text_encoder(config).tokenizer()([""])
        if (tokens := release.arch.tokens) not in (None, len(empty)):
            raise ConfigError(
                f"{name} takes texts of {tokens} tokens at latents of {sides[0]} x {sides[1]}, and those of the text "
                f"encoder have {len(empty)}: give the size with --side=N or --side=H,W, or another text encoder"
            )
        space = Space((*sides, release.arch.channels), Conditions(empty))
    components = build.components_of(config, space, layout, optax.identity())
    experiment = build.Experiment(config, space, layout.with_rules(components.model.rules), components, {})
    about = {"kind": "release", "family": release.family, "file": name, "model": config.model.to_dict()}
    about |= {"weights": {"entry": weights}}
    del release  # frees the parameters: `load` reads them again

    def load(step: int, weights_of: str = "ema") -> Params:
        params = releases.open_release(file, family, heads, weights)[0].params
        return sharding.put(params, sharding.shardings(params, experiment.layout))

    def opened(split: str) -> Dataset:
        if data is None:
            raise ConfigError(f"{name} comes without data: say what to show it with --data=NAME=DIR")
        return fitting(build.open_data(config, split), config.data.name, space)

    return Trained(name, experiment, (0,), load, lambda step: {}, opened, None, place, about)


def check_null_label(file: str | Path, release: releases.Release) -> None:
    """Raise ConfigError for a release without a null label, whose last row would be taken for it."""
    if release.arch.num_classes == IMAGENET - 1:
        raise ConfigError(
            f"{file}: its table of labels has {IMAGENET} rows, the classes of ImageNet without a null label. It was "
            f"trained without dropped labels, wanted {IMAGENET + 1} rows"
        )


class Source(NamedTuple):
    """A trained network at one step, ready to draw samples.

    sampler:    its sampler, with `options`. make: other options -> another sampler.
    params:     of the network. weak: of a weaker one to guide by (autoguidance), or None. frozen: of the codec.
    shape:      of an image; None if samples stay latents.
    conditions: (rule of `conditioning.RULES`, num, seed) -> the stored conditions of `num` samples.
    prompts:    texts -> their stored conditions. named: conditions -> what they say, or None.
    folder:     where samples go by default.
    about:      what it is, for a record of scores.
    """

    name: str
    sampler: sampler.Sampler
    make: Callable[..., sampler.Sampler]
    options: dict[str, Any]
    params: Params
    weak: Params | None
    frozen: Any
    space: Space
    shape: tuple[int, ...] | None
    conditions: Callable[[str | None, int, int], Condition]
    prompts: Callable[[Sequence[str]], Condition]
    named: Callable[[Condition], list[str] | None]
    folder: Path
    about: dict[str, Any]


def drawing(
    found: Trained,
    step: int | None = None,
    weak_step: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str = "ema",
) -> Source:
    """A trained network, made ready to draw samples.

    step:      of the checkpoint; None: the last.
    weak_step: guide by the run's own weights at this earlier step, with cfg_scale (autoguidance, arXiv 2406.02507).
    overrides: changes to the sampler's options.
    weights:   of a run, one of WEIGHTS, also for `weak_step`.
    """
    experiment, overrides = found.experiment, dict(overrides or {})
    codec, chosen = experiment.components.codec, configs.copied(experiment.config.sampler)
    default = solve.DEFAULTS.get(type(experiment.components.objective.predicts), {})
    if found.workdir is None and overrides.get("solver") in (None, default.get("solver")):
        chosen.update(default)  # a release is sampled as in its paper
    chosen.update(overrides)
    options = configs.keywords(chosen, "config.sampler", sampler.make)
    step, online = found.last if step is None else step, weights == "online"
    params = found.load(step, weights)
    weak = None if weak_step is None else found.load(weak_step, weights)
    about = {name: value for name, value in found.about.items() if name != "losses"}
    about["weights"] = {"digest": digest(params)} | about["weights"] | ({"online": True} if online else {})
    about["weak"] = None if weak is None else {"step": weak_step, "digest": digest(weak)}
    decoder = experiment.config.codec.to_dict()
    decoder = {key: decoder[key] for key in ("name", "vae", "scale", "precision", "rounding") if key in decoder}
    if decoder.get("vae") is not None:
        release = open_vae(decoder["vae"])
        decoder["vae"] = {"name": release.name, "sha256": release.digest}
    about["decoder"] = decoder
    if (text := experiment.config.text_encoder) is not None:
        stamp = about["text_encoder"] = {key: text[key] for key in ("name", "pooled", "dtype") if key in text}
        if text.get("file") is not None:
            with contextlib.suppress(WeightsError):  # an encoder of a user may read other files
                stamp["sha256"] = weights_folder.digest(hub.local(text.file))
    if found.workdir is None:
        name, folder = found.label, found.folder.with_name(f"samples_{found.folder.name}")
    else:
        name, folder, about["step"] = f"{found.label}, step {step}", found.folder / f"samples_{step}", step
        if online:
            name, folder = f"{name}, without EMA", folder.with_name(f"{folder.name}_online")
    drawn, frozen = experiment.sampler(**options), build.frozen_weights(codec, experiment.layout)
    shape = build.sample_shape(codec, codec.shape(found.space.shape))
    given = partial(build.conditions, found.data, found.space)
    return Source(
        name,
        drawn,
        experiment.sampler,
        options,
        params,
        weak,
        frozen,
        found.space,
        shape,
        given,
        experiment.prompts,
        experiment.named,
        folder,
        about,
    )


def digest(params: Params) -> str:
    """A name for the values of parameters, 16 hex digits: equal on every mesh, and for a run and a file of it."""
    sums = sorted(checksums(sharding.by_name(params)).items())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]
