"""Trained networks: those of a run or of a public release, opened in one way for sampling, evaluation and analysis.

found = of_run("runs/mine")
source = drawing(found, overrides={"cfg_scale": 1.8})
images = source.sampler(source.params, source.frozen, source.conditions("balanced", 16, seed=0), seed=0)
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from diversedit_jax import conditioning, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Condition, Params, Space
from diversedit_jax.config import slot
from diversedit_jax.data import Dataset
from diversedit_jax.data.pipeline import stacked
from diversedit_jax.diffusion import solve
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.registry import one_of
from diversedit_jax.runs.build import (
    Experiment,
    abstract_params,
    build,
    components_of,
    from_json,
    frozen_weights,
    held_out,
    on_this_machine,
    open_data,
    sample_shape,
)
from diversedit_jax.sampling import sampler
from diversedit_jax.sampling.sampler import Sampler
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.checksums import checksums
from diversedit_jax.training.step import initializer
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.vae import open_vae

WEIGHTS = {"ema": "ema", "online": "params"}  # which weights, and their entry in a checkpoint


class Trained(NamedTuple):
    """A trained network at one checkpoint or several, and what it was trained with.

    label:      for people; in an analysis those of the same label are seeds of one setting.
    experiment: its components, on the devices of this machine.
    steps:      of its checkpoints, in order; (0,) of a release.
    load:       (step, weights of WEIGHTS) -> parameters of the network.
    trained:    step -> {"losses", "objective", "memory"}: what the losses and the objective have learned.
    data:       split -> data set.
    workdir:    of a run; None for a release.
    folder:     where samples and reports go if nobody says.
    about:      what it is, for records.
    notes:      what could not be had, in words.
    """

    label: str
    experiment: Experiment
    steps: tuple[int, ...]
    load: Callable[[int, str], Params]
    trained: Callable[[int], dict[str, Any]]
    data: Callable[[str], Dataset]
    workdir: Path | None
    folder: Path
    about: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def space(self) -> Space:
        """Where its stored examples live."""
        return self.experiment.space

    def conditions(self, rule: str | None, num: int, seed: int) -> Condition:
        """The conditions of `num` samples, by a rule of `conditioning.RULES`."""
        return conditioning.chosen(rule, num, self.space.conditions, seed, partial(held_out, self.data))


def of_run(
    workdir: str | Path,
    *,
    data: Mapping[str, Any] | None = None,
    vae: str | None = None,
    rounding: str | None = None,
    model: Mapping[str, Any] | None = None,
    encoders: bool = False,
) -> Trained:
    """The run in `workdir`.

    data:     a slot of `data` instead of config.data.
    vae, rounding: of config.codec, where latents are decoded.
    model:    options to change in config.model, where it has them.
    encoders: also open frozen encoders, for losses that read them. If a file is missing, those losses are left out.
    """
    workdir = Path(workdir).expanduser().absolute()
    config = on_this_machine(configs.load(workdir))
    if data is not None:
        config.data = ConfigDict(data)
    for option, value in (("vae", vae), ("rounding", rounding)):
        if value is not None:
            if option not in config.codec:
                raise ConfigError(f"--{option}={value}: the codec {config.codec.name} of {workdir} has no such option")
            config.codec[option] = value
    config.model.update({option: value for option, value in (model or {}).items() if option in config.model})
    checkpoints = Checkpoints(workdir / "checkpoints")
    space, notes = from_json(checkpoints.meta()), []
    try:
        experiment = build(config if encoders else without_encoders(config), space)
    except RunError as error:
        if not (encoders and config.encoders):
            raise
        experiment = build(without_encoders(config), space)
        if experiment.components.objective.reads:
            raise
        notes.append(f"its encoders are left out ({error}), and with them the losses that read them")
    parts, layout = experiment.components, experiment.layout
    opened = partial(open_data, config)

    def load(step: int, weights: str = "ema") -> Params:
        entry = WEIGHTS[one_of("weights", weights, WEIGHTS)]
        return checkpoints.restore_part(abstract_params(parts.model, layout), entry, step)[0]

    def trained(step: int) -> dict[str, Any]:
        example = jax.tree.map(jnp.asarray, stacked([opened("train").source[0]]))
        state = jax.eval_shape(initializer(parts, example), jax.random.key(0))
        found = {}
        for entry in ("losses", "objective", "memory"):
            wanted = sharding.placed(state[entry], sharding.shardings(state[entry], layout))
            known = jax.tree.leaves(wanted)
            found[entry] = checkpoints.restore_part(wanted, entry, step)[0] if known else wanted
        return found

    about = {"kind": "run", "model": config.model.to_dict(), "losses": config.losses.to_dict()}
    about |= {"weights": {"ema_decay": config.ema_decay}}
    steps = tuple(checkpoints.steps())
    return Trained(workdir.name, experiment, steps, load, trained, opened, workdir, workdir, about, tuple(notes))


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
    side: int | None = None,
    *,
    data: Mapping[str, Any] | None = None,
    vae: str | None = None,
    rounding: str | None = None,
    model: Mapping[str, Any] | None = None,
) -> Trained:
    """The release in a weight file, see `weights.dit.open_release`.

    side: of its latents, where it does not store it. data: a slot of `data` to show it, for analysis.
    vae: the autoencoder that decodes its latents. rounding: of the decoded images. model: options to change in it.
    """
    file = Path(file).expanduser().absolute()
    release, _ = releases.open_release(file, family, heads, weights)
    side = side or release.side
    if side is None:
        raise ConfigError(f"{file} does not store the side of its latents: give it with --side=N")
    given = {name: value for name, value in (("vae", vae), ("rounding", rounding)) if value is not None}
    codec = slot("codecs", "vae", **given)
    if data is not None and data["name"] in ("digits", "images", "synthetic"):  # pixels
        codec = slot("codecs", "pixels", **{name: value for name, value in given.items() if name == "rounding"})
    config = ConfigDict(
        {
            "data": ConfigDict(data or {}),
            "codec": codec,
            "encoders": ConfigDict(),
            "model": slot("models", **release.model | dict(model or {})),
            "objective": slot("objectives", **release.objective),
            "losses": ConfigDict(),
            "ema_decay": 0.0,
            "accumulate": 1,
        }
    )
    layout, space = sharding.make(), release.space(side)
    components = components_of(config, space, layout, optax.identity())
    config.sampler = configs.options(sampler.make)
    layout = layout.with_rules(components.model.rules)
    experiment = Experiment(config, space, layout, components, {})
    kind = release.family
    del release  # its parameters are read again when they are used

    def load(step: int, weights_of: str = "ema") -> Params:
        params = releases.open_release(file, family, heads, weights)[0].params
        return sharding.put(params, sharding.shardings(params, layout))

    def opened(split: str) -> Dataset:
        if data is None:
            raise ConfigError(
                f"{file.name} comes without data: say what to show it with --data=NAME=DIR, such as --data=latents=DIR"
            )
        dataset = open_data(config, split)
        if dataset.space.shape != space.shape:
            wanted = f"the network takes {space.shape}"
            raise ConfigError(f"--data={config.data.name}: its shape is {dataset.space.shape}, {wanted}")
        return dataset

    about = {"kind": "release", "family": kind, "file": file.name, "model": config.model.to_dict()}
    about |= {"weights": {"entry": weights}}
    folder = file.with_name(file.stem)
    return Trained(file.name, experiment, (0,), load, lambda step: {}, opened, None, folder, about)


class Source(NamedTuple):
    """A trained network at one step, ready to draw samples.

    sampler:  its sampler. make: options -> another sampler of it. options: of `sampler`, all of them.
    params, weak: of the network, and of a weaker one to guide by (autoguidance), or None. frozen: of the codec.
    shape:    of an image; None where samples stay latents.
    folder:   where samples go if nobody says.
    about:    what this is, for a record of scores.
    """

    name: str
    sampler: Sampler
    make: Callable[..., Sampler]
    options: dict[str, Any]
    params: Params
    weak: Params | None
    frozen: Any
    space: Space
    shape: tuple[int, ...] | None
    conditions: Callable[[str | None, int, int], Condition]
    folder: Path
    about: dict[str, Any]


def drawing(
    found: Trained,
    step: int | None = None,
    weak_step: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Source:
    """A trained network, made ready to draw samples with its EMA weights.

    step: of the checkpoint, by default the last. overrides: of the sampler's options.
    weak_step: guide by the run's own weights at this earlier step, with cfg_scale (autoguidance, arXiv 2406.02507).
    """
    experiment, overrides = found.experiment, dict(overrides or {})
    parts, layout = experiment.components, experiment.layout
    chosen = configs.copied(experiment.config.sampler)
    default = solve.DEFAULTS.get(type(parts.objective.predicts), {})
    if found.workdir is None and overrides.get("solver") in (None, default.get("solver")):
        chosen.update(default)  # a release is sampled as its paper does
    chosen.update(overrides)
    options = configs.keywords(chosen, "config.sampler", sampler.make)
    step = found.steps[-1] if step is None and found.steps else step
    params = found.load(step, "ema")
    weak = None if weak_step is None else found.load(weak_step, "ema")
    shape = sample_shape(parts.codec, parts.codec.shape(found.space.shape))
    about = {name: value for name, value in found.about.items() if name != "losses"}
    about["weights"] = {"digest": digest(params)} | about["weights"]
    about["weak"] = None if weak is None else {"step": weak_step, "digest": digest(weak)}
    about["decoder"] = _decoder(experiment.config.codec.to_dict())
    if found.workdir is None:
        name, folder = found.label, found.folder.with_name(f"samples_{found.folder.name}")
    else:
        name, folder, about["step"] = f"{found.label}, step {step}", found.folder / f"samples_{step}", step
    make = partial(sampler.make, *experiment.sampled())
    return Source(
        name,
        make(**options),
        make,
        options,
        params,
        weak,
        frozen_weights(parts.codec, layout),
        found.space,
        shape,
        found.conditions,
        folder,
        about,
    )


def digest(params: Params) -> str:
    """A name for the values of parameters, 16 hex digits: the same on every mesh, for a run and a file alike."""
    sums = sorted(checksums(sharding.by_name(params)).items())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def _decoder(codec: Mapping[str, Any]) -> dict[str, Any]:
    """What turns samples into images, as far as it changes a score."""
    kept = {key: codec[key] for key in ("name", "vae", "scale", "precision", "rounding") if key in codec}
    if kept.get("vae") is not None:
        release = open_vae(kept["vae"])
        kept["vae"] = {"name": release.name, "sha256": release.digest}
    return kept
