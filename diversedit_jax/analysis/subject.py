"""What is looked into: the checkpoints of a run, or the weights of a public release, with data to show them.

    run = of_run("runs/mine")
    weights = run.load(run.steps[-1])

Labels are never dropped here, and features are taken behind the long residual connections or before them (`capture`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from diversedit_jax import codecs, losses, models, objectives, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Params
from diversedit_jax.config import slot
from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.runs import build, trained
from diversedit_jax.training import optimizer as optim
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.step import Parts, initializer
from diversedit_jax.weights import dit as releases

CAPTURES = ("merged", "block")  # behind the long residual connection of a block, or before it
WEIGHTS = {"ema": "ema", "online": "params"}  # which weights, and their entry in a checkpoint


class Subject(NamedTuple):
    """One network, at one checkpoint or several.

    label:   for people; subjects of the same label are seeds of one setting.
    steps:   of its checkpoints, in order; [0] of a release.
    load:    step -> parameters. heads: step -> those of the auxiliary losses.
    parts:   the model and what trains it, without label drop; the diversity loss at full weight.
    times:   t [b] in [0, 1] -> the time as the network takes it.
    null:    the label of no class.
    data:    split -> data set. workdir: of a run, None of a release.
    about:   what it is, for the record. notes: what could not be had, in words.
    """

    label: str
    steps: tuple[int, ...]
    load: Callable[[int], Params]
    heads: Callable[[int], Params]
    parts: Parts
    frozen: Any
    layout: sharding.Layout
    shape: tuple[int, int, int]
    null: int
    times: Callable[[Float[Array, " b"]], Array]
    data: Callable[[str], Dataset]
    workdir: Path | None
    about: dict[str, Any]
    notes: tuple[str, ...]

    def features(self, params: Params, frozen: Any, batch: Mapping[str, Array], t: Array, key: Array) -> Array:
        """The output of every block for a stored batch at time t, [l b n d]; a class token is left out."""
        network = self.parts.model.network(params)
        key_prepare, key_noise = jax.random.split(key)
        prepared = self.parts.codec.encode(frozen, batch, key_prepare)
        forward = self.parts.objective(network, prepared, key_noise)  # its noise is used, its pass is not computed
        _, found = forward.rerun(network, self.times(jnp.full(len(batch["y"]), t)))
        first = 0 if self.parts.model.token_width is None else 1
        return jnp.stack(found[1:])[:, :, first:].astype(jnp.float32)


def of_run(
    workdir: str | Path,
    label: str | None = None,
    weights: str = "ema",
    capture: str = "merged",
    data: Mapping[str, Any] | None = None,
) -> Subject:
    """The run in `workdir`. weights: of WEIGHTS. data: a slot of `data`, in place of config.data."""
    workdir = Path(workdir).expanduser().absolute()
    config = configs.load(workdir)
    _check(weights, capture)
    if capture != "merged" and "capture" not in config.model:
        raise ConfigError(f"--capture={capture}: the model {config.model.name} of {workdir} has no such option")
    if "capture" in config.model:
        config.model.capture = capture
    if data is not None:
        config.data = ConfigDict(data)
    checkpoints = Checkpoints(workdir / "checkpoints")
    meta, notes = checkpoints.meta(), []
    shape, classes = tuple(meta["shape"]), meta["num_classes"]
    try:
        subject = of_config(config, shape, classes)
    except RunError as error:
        if not config.encoders or config.objective.name == "reg":
            raise
        notes.append(f"its encoders are left out ({error}), and with them the losses that read them")
        subject = of_config(without_encoders(config), shape, classes)
    parts = subject.parts
    target = build.abstract_params(parts.model, subject.layout)

    def load(step: int) -> Params:
        return checkpoints.restore_part(target, WEIGHTS[weights], step)[0]

    def heads(step: int) -> Params:
        example = {name: jnp.asarray(x)[None] for name, x in subject.data("train").source[0].items()}
        wanted = jax.eval_shape(initializer(parts, example), jax.random.key(0))["losses"]
        if not jax.tree.leaves(wanted):
            return wanted
        placed = sharding.placed(wanted, sharding.shardings(wanted, subject.layout))
        return checkpoints.restore_part(placed, "losses", step)[0]

    return subject._replace(
        label=label or workdir.name,
        steps=tuple(checkpoints.steps()),
        load=load,
        heads=heads,
        workdir=workdir,
        about=subject.about | {"weights": weights, "capture": capture},
        notes=tuple(notes),
    )


def of_config(config: ConfigDict, shape: tuple[int, int, int], num_classes: int) -> Subject:
    """What a config describes, for samples of `shape`; it has no checkpoints."""
    config = build.elsewhere(config)
    for name, value in (("label_drop", 0.0), ("groups", 1)):
        if name in config.objective:
            config.objective[name] = value
    for loss in config.losses.values():
        if loss.name == "diversity":  # its gradient is asked for also where the adaptive weight is 0
            loss.update({"weight": "constant", "coefficient": 1.0, "warmup_steps": 0})
    built = build.build(config, shape, num_classes)
    parts = built.parts if built.parts.losses else built.parts._replace(losses=_supposed())

    def none(step: int) -> Params:
        raise KeyError(step)

    return Subject(
        "",
        (),
        none,
        none,
        parts,
        build.prepared(parts.codec, built.layout),
        built.layout,
        shape,
        num_classes,
        _times(config.objective.to_dict()),
        partial(build.open_data, config),
        None,
        {"kind": "run", "model": config.model.to_dict(), "losses": config.losses.to_dict()},
        (),
    )


def without_encoders(config: ConfigDict) -> ConfigDict:
    """A copy of a config without its frozen encoders and the losses that read them."""
    config = configs.copied(config)
    config.losses = ConfigDict({key: loss for key, loss in config.losses.items() if loss.name != "repa"})
    config.encoders = ConfigDict()
    return config


def of_release(
    file: str | Path,
    label: str | None = None,
    data: Mapping[str, Any] | None = None,
    family: str | None = None,
    heads: int | None = None,
    weights: str | None = None,
    side: int | None = None,
    capture: str = "merged",
    vae: str | None = None,
) -> Subject:
    """The release in a weight file (see `weights.dit.open_release`). data: a slot of `data`, which it is shown.

    vae: the autoencoder that decodes its latents, for pictures of what is seen.
    """
    file = Path(file).expanduser().absolute()
    _check("ema", capture)
    if data is None:
        raise ConfigError(
            f"{file.name} comes without data: say what to show it with --data=NAME=DIR, such as --data=latents=DIR"
        )
    release, shape = trained.opened_release(file, family, heads, weights, side)
    arch, layout = release.arch, sharding.make()
    if arch.token_width is not None:
        raise ConfigError(f"{file.name}: REG takes class tokens of an encoder: analyse a run of it, with --workdir")
    name = trained.release_model(release)
    model = models.make(name, shape, arch.num_classes, **releases.model_options(arch), capture=capture)
    if release.family in ("official_dit", "diffusers_dit"):
        objective = slot("objectives", "ddpm", label_drop=0.0)
    else:
        objective = slot("objectives", "mean_flow" if arch.second_time else "flow_matching", label_drop=0.0)
    config = ConfigDict({"data": ConfigDict(data), "codec": slot("codecs", "vae", vae=vae)})
    if config.data.name in ("digits", "images", "synthetic"):  # pixels
        config.codec = slot("codecs", "pixels")
    ready = codecs.make(**config.codec.to_dict())
    built = objectives.make(num_classes=arch.num_classes, **objective.to_dict())
    parts = Parts(model, ready, built, _supposed(), optim.make(1)[0], 0.0)
    arch_options, kind = releases.model_options(arch), release.family
    del release  # its parameters are read again when they are looked at

    def load(step: int) -> Params:
        return trained.placed(trained.opened_release(file, family, heads, weights, side)[0].params, layout)

    def opened(split: str) -> Dataset:
        dataset = build.open_data(config, split)
        if dataset.shape != shape:
            raise ConfigError(f"--data={config.data.name}: its shape is {dataset.shape}, the network takes {shape}")
        return dataset

    about = {"kind": "release", "file": file.name, "family": kind, "capture": capture}
    about |= {"model": {"name": name} | arch_options}
    return Subject(
        label or file.stem,
        (0,),
        load,
        lambda step: {label: {} for label in parts.losses},
        parts,
        build.prepared(ready, layout),
        layout,
        shape,
        arch.num_classes,
        _times(objective.to_dict()),
        opened,
        None,
        about,
        (),
    )


def _check(weights: str, capture: str) -> None:
    for name, given, known in (("weights", weights, WEIGHTS), ("capture", capture, CAPTURES)):
        if given not in known:
            raise ConfigError(f"--{name}={given}: wanted one of {', '.join(known)}")


def _supposed() -> dict[str, Any]:
    """Of a network that was trained without auxiliary losses: the diversity loss, to see what it would ask for."""
    return {"diversity (not trained)": losses.make("diversity", preset="release", weight="constant")}


def _times(objective: Mapping[str, Any]) -> Callable[[Array], Array]:
    """From t in [0, 1] to the network's time: a step of the diffusion for a discrete one."""
    steps = objective.get("num_timesteps")
    return (lambda t: t) if steps is None else (lambda t: jnp.round(t * (steps - 1)))
