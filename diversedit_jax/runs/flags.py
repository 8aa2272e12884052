"""The flags by which programs name what they sample from: a run or a release, its checkpoint, its sampler."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from diversedit_jax.codecs import pixels
from diversedit_jax.diffusion import solve, solvers
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs.trained import Source, drawing, of_release, of_run
from diversedit_jax.weights.dit import FAMILIES

SAMPLER = ("solver", "steps", "cfg_scale", "token_cfg_scale", "guidance_interval", "guidance_channels")
SAMPLER += ("diffusion", "last_step_kind", "last_step", "rtol", "atol", "eta", "batch_size")
RELEASE = ("checkpoint", "family", "heads", "weights", "side")


def define_release_flags() -> None:
    """The flags that name a release."""
    flags.DEFINE_string(
        "checkpoint", None, "Weights of a public release: .safetensors, .pt, .pth, or as flax and orbax write."
    )
    flags.DEFINE_enum("family", None, list(FAMILIES), "What the release is, where its arrays do not tell.")
    flags.DEFINE_integer("heads", None, "Attention heads of the release, for a width that no published size has.")
    flags.DEFINE_string("weights", None, "Entry of the release's file: by default its EMA.")
    flags.DEFINE_integer("side", None, "Side of the release's latents, where it does not store it.")


def define_flags() -> None:
    """The flags that `source` reads."""
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
    flags.DEFINE_string("solver", None, f"One of {', '.join(solve.NAMES)}.")
    flags.DEFINE_integer("steps", None, "Steps of the solver.")
    flags.DEFINE_float("cfg_scale", None, "Scale of classifier-free guidance; 1: none.")
    flags.DEFINE_float("token_cfg_scale", None, "That of a class token; by default cfg_scale. 0 or less: not guided.")
    flags.DEFINE_list("guidance_interval", None, "lo,hi: guide while lo <= t <= hi; t = 1 is noise.")
    flags.DEFINE_integer("guidance_channels", None, "Guide the first so many channels only.")
    flags.DEFINE_string("diffusion", None, f"Of stochastic solvers, one of {', '.join(solvers.DIFFUSIONS)}.")
    flags.DEFINE_string("last_step_kind", None, f"Of stochastic solvers, one of {', '.join(solvers.LAST_STEPS)}.")
    flags.DEFINE_float("last_step", None, "Of stochastic solvers: the time at which the last step begins.")
    flags.DEFINE_float("rtol", None, "Of dopri5: the relative tolerance.")
    flags.DEFINE_float("atol", None, "Of dopri5: the absolute tolerance.")
    flags.DEFINE_float("eta", None, "Of ddim: 0 is deterministic, 1 has the posterior's variance.")
    flags.DEFINE_integer("batch_size", None, "Samples at a time, over all devices.")


def source(defaults: Mapping[str, Any] | None = None) -> Source:
    """What the flags name, ready to draw. defaults: of the sampler and `rounding`, where no flag is given."""
    given = flags.FLAGS
    overrides = dict(defaults or {})
    rounding = overrides.pop("rounding", None)
    rounding = given.rounding or rounding
    overrides |= {name: given[name].value for name in SAMPLER if given[name].value is not None}
    if given.guidance_interval is not None:
        overrides["guidance_interval"] = numbers("guidance_interval", given.guidance_interval, float, 2)
    if (given.workdir is None) == (given.checkpoint is None):
        raise ConfigError("give --workdir=DIR of a run or --checkpoint=FILE of a release")
    codec = {"vae": given.vae, "rounding": rounding}
    if given.workdir is not None:
        return drawing(of_run(given.workdir, **codec), given.step, given.weak_step, overrides)
    return drawing(of_release(*(given[name].value for name in RELEASE), **codec), overrides=overrides)


def numbers(name: str, texts: list[str], kind: type, count: int | None = None) -> tuple:
    """The values of a list flag. ConfigError if they are not numbers, or not `count` of them."""
    try:
        found = tuple(kind(text) for text in texts)
    except ValueError:
        raise ConfigError(f"--{name}={','.join(texts)}: must be numbers separated by commas") from None
    if count is not None and len(found) != count:
        raise ConfigError(f"--{name}={','.join(texts)}: must be {count} numbers")
    return found
