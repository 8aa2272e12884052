"""The flags by which programs name what they sample from: a run or a release, its checkpoint, its sampler."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from diversedit_jax import config as configs
from diversedit_jax.codecs import pixels
from diversedit_jax.diffusion import solve, solvers
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import options
from diversedit_jax.runs.trained import Source, drawing, of_release, of_run
from diversedit_jax.runtime import cli
from diversedit_jax.sampling import sampler
from diversedit_jax.weights import hub
from diversedit_jax.weights.dit import FAMILIES

SAMPLER = list(options(sampler.make))  # the names of its options, and of their flags
GROUPS = {
    "The run": ["workdir", "step", "online", "weak_step", "trust_workdir"],
    "Or a release": ["checkpoint", "family", "heads", "weights", "side"],
    "Conditions and images": ["data", "text_encoder", "vae", "rounding"],
    "The sampler; by default as the run or the release says": SAMPLER,
}


def define_release_flags() -> None:
    """The flags that name a release, and the one that says which weights of a run to take."""
    checkpoint = (
        "Weights of a public release (.safetensors, .pt, .pth, flax, orbax) or a published run. A file, a folder"
    )
    flags.DEFINE_string("checkpoint", None, f"{checkpoint}, or hf:owner/name[@revision][:file].")
    flags.DEFINE_enum("family", None, list(FAMILIES), "What the release is, if its arrays do not say it.")
    flags.DEFINE_integer("heads", None, "Attention heads of the release, for a width that no published size has.")
    flags.DEFINE_string("weights", None, "Entry of the release's file; by default its EMA.")
    flags.DEFINE_bool("online", False, "Use the trained weights instead of their EMA.")
    trust = "Run code outside this package that the config stored in a workdir names, such as a loss of your own."
    flags.DEFINE_bool("trust_workdir", False, trust)
    flags.DEFINE_list("side", None, "N or H,W: size of the release's latents, if it does not store it.")


def define_flags() -> None:
    """The flags that `source` reads."""
    define_release_flags()
    flags.DEFINE_string("workdir", None, "Directory of a run.")
    held_out = "NAME=DIR,OPTION=VALUE,...: data whose held-out conditions to take, instead of the run's own."
    flags.DEFINE_string("data", None, held_out)
    flags.DEFINE_string(
        "vae", None, "Autoencoder that decodes latents: a folder as diffusers writes it, a file, or hf:owner/name."
    )
    flags.DEFINE_string(
        "text_encoder",
        None,
        "CLIP's text encoder with its tokenizer, if not where the run has it: a folder or hf:owner/name.",
    )
    rounding = f"Rounding of images to 256 levels; by default as in the run, or {pixels.ROUNDING}."
    flags.DEFINE_enum("rounding", None, list(pixels.ROUNDINGS), rounding)
    flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the last.")
    flags.DEFINE_integer("weak_step", None, "Guide by the checkpoint of this earlier step, with cfg_scale.")
    flags.DEFINE_string("solver", None, f"One of {', '.join(solve.NAMES)}.")
    flags.DEFINE_integer("steps", None, "Steps of the solver.")
    flags.DEFINE_float("cfg_scale", None, "Scale of classifier-free guidance; 1: none.")
    flags.DEFINE_float(
        "token_cfg_scale", None, "Scale for a class token; by default cfg_scale. 0 or less: no guidance."
    )
    flags.DEFINE_list("guidance_interval", None, "lo,hi: guide while lo <= t <= hi; t = 1 is noise.")
    flags.DEFINE_integer("guidance_channels", None, "Guide only this many channels, the first.")
    flags.DEFINE_string("diffusion", None, f"Of stochastic solvers, one of {', '.join(solvers.DIFFUSIONS)}.")
    flags.DEFINE_string("last_step_kind", None, f"Of stochastic solvers, one of {', '.join(solvers.LAST_STEPS)}.")
    flags.DEFINE_float("last_step", None, "Of stochastic solvers: the time at which the last step begins.")
    flags.DEFINE_float("rtol", None, "Of dopri5: the relative tolerance.")
    flags.DEFINE_float("atol", None, "Of dopri5: the absolute tolerance.")
    flags.DEFINE_float("eta", None, "Of ddim: 0 is deterministic, 1 has the variance of the posterior.")
    flags.DEFINE_integer("batch_size", None, "Samples at a time, over all devices.")


def source(defaults: Mapping[str, Any] | None = None) -> Source:
    """What the flags name, ready to draw. defaults: of the sampler's flags and of --rounding."""
    given = flags.FLAGS
    overrides = dict(defaults or {})
    rounding = overrides.pop("rounding", None)
    changes = {"vae": given.vae, "rounding": given.rounding or rounding, "text_encoder": given.text_encoder}
    changes["data"] = data_of(given.data)
    named = [name for name in SAMPLER if name in given and given[name].value is not None]
    overrides |= {name: given[name].value for name in named}
    if given.guidance_interval is not None:
        overrides["guidance_interval"] = numbers("guidance_interval", given.guidance_interval, float, 2)
    if (given.workdir is None) == (given.checkpoint is None):
        raise ConfigError("give --workdir=DIR of a run or --checkpoint=FILE of a release")
    place = given.workdir or given.checkpoint
    if given.workdir is not None or configs.holds_run(hub.local(place)):
        found = of_run(place, **changes, trust=given.trust_workdir)
        return drawing(found, given.step, given.weak_step, overrides, "online" if given.online else "ema")
    release = (given.checkpoint, given.family, given.heads, given.weights, sides(given.side))
    return drawing(of_release(*release, **changes), overrides=overrides)


def data_of(text: str | None) -> dict[str, Any] | None:
    """Read --data=NAME=DIR,OPTION=VALUE,... as a slot of `data`."""
    if text is None:
        return None
    ((name, options),) = cli.named_files("data", [text]).items()
    given = ({"data_dir": options.pop("file")} if "file" in options else {}) | options
    return configs.slot("data", name, **given).to_dict()


def sides(texts: list[str] | None) -> tuple[int, ...] | None:
    """The value of --side: one number or two, 1 or more."""
    if texts is None:
        return None
    found = numbers("side", texts, int)
    if len(found) not in (1, 2) or min(found) < 1:
        raise ConfigError(f"--side={','.join(texts)}: must be N or H,W, 1 or more")
    return found


def numbers(name: str, texts: list[str], kind: type, count: int | None = None) -> tuple:
    """The values of a list flag. ConfigError if they are not numbers, or not `count` of them."""
    try:
        found = tuple(kind(text) for text in texts)
    except ValueError:
        raise ConfigError(f"--{name}={','.join(texts)}: must be numbers separated by commas") from None
    if count is not None and len(found) != count:
        raise ConfigError(f"--{name}={','.join(texts)}: must be {count} numbers")
    return found
