"""What samples are drawn from: a trained run or the weights of a public release, with a sampler; and the flags for it.

    source = of_run("runs/mine", overrides={"cfg_scale": 1.8})
    images = source.sample(source.params, source.frozen, labels, seed, source.weak)

Where nothing else is said a run samples by its own sampler, a release by the papers' (SDE or DDPM, 250 steps; MeanFlow
1 step).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from diversedit_jax import codecs, models, registry, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Params
from diversedit_jax.codecs import pixels
from diversedit_jax.diffusion import solvers
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build as experiment
from diversedit_jax.sampling import sampler
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.checksums import by_path, checksums
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.vae import open_vae

OVERRIDES = ("solver", "steps", "cfg_scale", "token_cfg_scale", "guidance_interval", "guidance_channels")
OVERRIDES += ("diffusion", "last_step_kind", "last_step", "rtol", "atol", "eta", "batch_size")


class Source(NamedTuple):
    """What is sampled from, ready to sample.

    make:    sampler options -> Sample, as `sampling.make` of this network. options: the sampler's, all of them.
    shape:   (h, w, c) of the images, None where samples stay latents.
    frozen:  weights of the decoder. weak: parameters to guide by (autoguidance), or None.
    name:    for people. folder: where samples go if nobody says. about: what this is, for a record of scores.
    """

    make: Callable[..., sampler.Sample]
    options: dict[str, Any]
    sample: sampler.Sample
    params: Params
    weak: Params | None
    frozen: Any
    shape: tuple[int, int, int] | None
    num_classes: int
    name: str
    folder: Path
    about: dict[str, Any]


def of_run(
    workdir: str | Path,
    step: int | None = None,
    weak_step: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    vae: str | None = None,
    rounding: str | None = None,
) -> Source:
    """The EMA of the run in `workdir` at `step`, by default the last. overrides: of `config.sampler`.

    vae: in place of config.codec.vae, where latents are decoded. rounding: in place of config.codec.rounding.
    weak_step: guide by the run's own weights at this earlier step, with cfg_scale (autoguidance, arXiv 2406.02507).
    """
    workdir = Path(workdir).expanduser().absolute()
    config = experiment.elsewhere(configs.load(workdir))
    config.sampler.update(overrides or {})
    if vae is not None:
        if config.codec.name != "vae":
            raise ConfigError(f"--vae={vae}: the run trains on {config.codec.name}, not on latents")
        config.codec.vae = vae
    if rounding is not None:
        config.codec.rounding = rounding
    config.encoders = ConfigDict()  # only losses read their features: sampling works without their files
    checkpoints = Checkpoints(workdir / "checkpoints")
    meta = checkpoints.meta(step)
    step = checkpoints.latest() if step is None else step
    layout, parts, sample, _ = experiment.build(config, tuple(meta["shape"]), meta["num_classes"])
    make = experiment.sampler(config, layout, parts, tuple(meta["shape"]), meta["num_classes"])
    target = experiment.abstract_params(parts.model, layout)
    params, _ = checkpoints.restore_part(target, "ema", step)
    weak = None if weak_step is None else checkpoints.restore_part(target, "ema", weak_step)[0]
    frozen = experiment.prepared(parts.codec, layout)
    options = configs.keywords(config.sampler, "config.sampler", sampler.make)
    about = {
        "kind": "run",
        "step": step,
        "weights": {"digest": digest(params), "ema_decay": config.ema_decay},
        "model": config.model.to_dict(),
        "weak": None if weak is None else {"step": weak_step, "digest": digest(weak)},
        "decoder": _decoder(config.codec.to_dict()),
    }
    folder = workdir / f"samples_{step}"
    shape = experiment.image_shape(parts.codec, tuple(meta["shape"]))
    name = f"{workdir.name}, step {step}"
    return Source(make, options, sample, params, weak, frozen, shape, meta["num_classes"], name, folder, about)


def of_release(
    file: str | Path,
    family: str | None = None,
    heads: int | None = None,
    weights: str | None = None,
    side: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    vae: str | None = None,
    rounding: str | None = None,
) -> Source:
    """The release in a weight file (see `weights.dit.open_release`). side: of its latents, where it stores none.

    overrides: of the sampler: options of `sampling.make`. vae: the autoencoder that decodes its latents; rounding: of
    the decoded images, as in `codecs.vae`.
    """
    file = Path(file).expanduser().absolute()
    release, shape = opened_release(file, family, heads, weights, side)
    arch, family, name = release.arch, release.family, release_model(release)
    chosen = releases.model_options(arch)
    model = models.make(name, shape, arch.num_classes, **chosen)
    options = _defaults(sampler.make) | dict(overrides or {})
    if family in ("official_dit", "diffusers_dit"):
        trained, options = sampler.Diffusion(), options | {"solver": (overrides or {}).get("solver", "ddpm")}
    elif arch.second_time:
        trained = sampler.AverageVelocity()
        if (overrides or {}).get("solver", "mean_flow") == "mean_flow":
            options |= {"solver": "mean_flow", "steps": (overrides or {}).get("steps", 1)}
    else:
        trained = sampler.Flow()
    layout = sharding.make()
    params = placed(release.params, layout)
    decoding = {"vae": vae, "rounding": rounding or pixels.ROUNDING}
    latents = codecs.make("vae", **decoding)

    def make(**options: Any) -> sampler.Sample:
        return sampler.make(model, latents, shape, arch.num_classes, trained, layout, **options)

    sample = make(**options)
    folder = file.with_name(f"samples_{file.stem}")
    frozen = experiment.prepared(latents, layout)
    about = {
        "kind": "release",
        "family": family,
        "file": file.name,
        "weights": {"digest": digest(params), "entry": weights},
        "model": {"name": name} | _defaults(registry.factory("models", "dit")) | chosen,
        "weak": None,
        "decoder": _decoder({"name": "vae"} | _defaults(registry.factory("codecs", "vae")) | decoding),
    }
    decoded = experiment.image_shape(latents, shape)
    return Source(make, options, sample, params, None, frozen, decoded, arch.num_classes, file.name, folder, about)


def opened_release(
    file: Path, family: str | None, heads: int | None, weights: str | None, side: int | None
) -> tuple[releases.Release, tuple[int, int, int]]:
    """The release in a file, and the shape (h, w, c) of what its network takes; ConfigError where that is not known."""
    release, _ = releases.open_release(file, family, heads, weights)
    side = side or release.side
    if side is None:
        raise ConfigError(f"{file} does not store the side of its latents: give it with --side=N")
    return release, (side, side, release.arch.channels)


def release_model(release: releases.Release) -> str:
    """The model, in `models`, whose parameters a release has."""
    return "official_sit" if release.family == "official_sit" else "dit"


def placed(params: Params, layout: sharding.Layout) -> Params:
    """Parameters from the host, put where they live."""
    return sharding.put(params, sharding.shardings(params, layout))


def _defaults(build: Callable) -> dict[str, Any]:
    return {name: p.default for name, p in registry.options(build).items()}


def digest(params: Params) -> str:
    """A name for the values of parameters, 16 hex digits: the same on every mesh, for a run and a file alike."""
    sums = sorted(checksums(by_path(params)).items())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def _decoder(prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What turns samples into images, as far as it moves a score."""
    kept = {key: prepared[key] for key in ("name", "vae", "scale", "precision", "rounding") if key in prepared}
    if kept.get("vae") is not None:
        release = open_vae(kept["vae"])
        kept["vae"] = {"name": release.name, "sha256": release.digest}
    return kept


def define_release_flags() -> None:
    """The flags that name a release, all but `side` as `releases.open_release` takes them."""
    flags.DEFINE_string(
        "checkpoint", None, "Weights of a public release: .safetensors, .pt, .pth, or as flax and orbax write."
    )
    flags.DEFINE_enum("family", None, list(releases.FAMILIES), "What the release is, where its arrays do not tell.")
    flags.DEFINE_integer("heads", None, "Attention heads of the release, for a width that no published size has.")
    flags.DEFINE_string("weights", None, "Entry of the release's file: by default its EMA.")
    flags.DEFINE_integer("side", None, "Side of the release's latents, where it stores none.")


def define_flags() -> None:
    """The flags that `from_flags` reads."""
    define_release_flags()
    flags.DEFINE_string("workdir", None, "Directory of a run.")
    flags.DEFINE_string("vae", None, "Autoencoder that decodes latents: a folder as diffusers writes it, or a file.")
    flags.DEFINE_enum(
        "rounding",
        None,
        list(pixels.ROUNDINGS),
        f"Of images to 256 levels; by default the run's, or {pixels.ROUNDING}.",
    )
    flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the last.")
    flags.DEFINE_integer("weak_step", None, "Guide by the checkpoint of this earlier step, with cfg_scale.")
    flags.DEFINE_string("solver", None, f"One of {', '.join(sampler.SOLVERS)}.")
    flags.DEFINE_integer("steps", None, "Steps of the solver.")
    flags.DEFINE_float("cfg_scale", None, "Scale of classifier-free guidance; 1: none.")
    flags.DEFINE_float("token_cfg_scale", None, "That of REG's class token; by default cfg_scale, <= 0: not guided.")
    flags.DEFINE_list("guidance_interval", None, "lo,hi: guide while lo <= t <= hi; t = 1 is noise.")
    flags.DEFINE_integer("guidance_channels", None, "Guide the first so many channels only.")
    flags.DEFINE_string("diffusion", None, f"Of stochastic solvers, one of {', '.join(solvers.DIFFUSIONS)}.")
    flags.DEFINE_string("last_step_kind", None, f"Of stochastic solvers, one of {', '.join(solvers.LAST_STEPS)}.")
    flags.DEFINE_float("last_step", None, "Of stochastic solvers: the time at which the last step begins.")
    flags.DEFINE_float("rtol", None, "Of dopri5: the relative tolerance.")
    flags.DEFINE_float("atol", None, "Of dopri5: the absolute tolerance.")
    flags.DEFINE_float("eta", None, "Of ddim: 0 is deterministic, 1 has the posterior's variance.")
    flags.DEFINE_integer("batch_size", None, "Samples at a time, over all devices.")


def from_flags(defaults: Mapping[str, Any] | None = None) -> Source:
    """The source that the flags name. defaults: of the sampler's options, and `rounding`, where no flag is given."""
    given = {name: flags.FLAGS[name].value for name in OVERRIDES if flags.FLAGS[name].value is not None}
    if "guidance_interval" in given:
        given["guidance_interval"] = numbers("guidance_interval", given["guidance_interval"], float, 2)
    overrides = dict(defaults or {}) | given
    rounding = overrides.pop("rounding", None)
    rounding = flags.FLAGS.rounding if flags.FLAGS.rounding is not None else rounding
    chosen = flags.FLAGS
    if (chosen.workdir is None) == (chosen.checkpoint is None):
        raise ConfigError("give --workdir=DIR of a run or --checkpoint=FILE of a release")
    if chosen.workdir is not None:
        return of_run(chosen.workdir, chosen.step, chosen.weak_step, overrides, chosen.vae, rounding)
    about = (chosen.checkpoint, chosen.family, chosen.heads, chosen.weights, chosen.side)
    return of_release(*about, overrides, chosen.vae, rounding)


def numbers(name: str, texts: list[str], kind: type, count: int | None = None) -> tuple:
    """The values of a list flag; ConfigError if they are not numbers, or not `count` of them."""
    try:
        found = tuple(kind(text) for text in texts)
    except ValueError:
        raise ConfigError(f"--{name}={','.join(texts)}: must be numbers separated by commas") from None
    if count is not None and len(found) != count:
        raise ConfigError(f"--{name}={','.join(texts)}: must be {count} numbers")
    return found
