"""Convert weights between public releases, or inspect them. Needs no torch, and runs no code from a file.

    python -m tools.convert_checkpoint SiT-XL-2-256.pt --inspect
    python -m tools.convert_checkpoint repa.pt out.safetensors
    python -m tools.convert_checkpoint DiT-XL-2-256.pt out.safetensors --family=official_dit --to=diffusers_dit
    python -m tools.convert_checkpoint runs/mine mine

IN is a .safetensors or PyTorch file of a release, a checkpoint of flax or orbax, the directory of one of our runs (its
EMA weights, or the trained ones with --online), or one of them on the hub, hf:owner/name. OUT is a .safetensors file
with the names of the family `--to`, by default the family of IN.

Any other OUT is a folder to publish a run in: model.safetensors and config.json, from which `--checkpoint=OUT` samples
as from the run, a model card, and a grid of samples if the run has one.
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax.api import Space
from diversedit_jax.codecs import network_space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import uvit as uvit_network
from diversedit_jax.models.dit import SIZES
from diversedit_jax.models.mmdit import text_of
from diversedit_jax.runs import build, exported, trained
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.versions import parameter_overview
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights import hub, mmdit, uvit
from diversedit_jax.weights.dit import FAMILIES
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tools import model_card


def describe(release: releases.Release, entries: dict[str, int]) -> str:
    """The architecture and parameters of a release, as lines."""
    ema = {"ema", "ema_params"} & entries.keys()
    facts = {"family": f"{release.family}: {FAMILIES[release.family].about}", **release.arch._asdict()}
    facts["image size"] = "not stored" if release.sides is None else " x ".join(map(str, release.sides))
    facts["in the file"] = ", ".join(f"{name} ({count} arrays)" for name, count in entries.items())
    facts["EMA"] = "present" if ema else "no" if "online" in entries else "not named: the arrays may be either"
    if release.unread:
        facts["not read"] = ", ".join(f"{path} ({dotted})" for path, dotted in release.unread.items())
    return "\n".join([*(f"{name:<14}{value}" for name, value in facts.items()), parameter_overview(release.params)])


def architecture(model: ConfigDict, space: Space) -> releases.AnyArchitecture:
    """The architecture of `config.model`, for a network that takes only x_t, t and y. space: of the network."""
    if model.name == "mmdit":
        (_, text), pooled = text_of(space.conditions)
        same = ("depth", "width", "heads", "patch", "mlp_ratio", "qk_norm", "registers", "table")
        own = {name: model[name] for name in same}
        return mmdit.Architecture(**own, channels=space.shape[-1], text=text, pooled=pooled)
    if model.name == "uvit":
        size = uvit_network.SIZES[model.size]._asdict()
        own = {name: value if model[name] is None else model[name] for name, value in size.items()}
        own |= {name: model[name] for name in ("patch", "mlp_ratio", "qkv_bias", "time_mlp")}
        *sides, channels = space.shape
        grid, text = tuple(side // model.patch for side in sides), uvit_network.text_of(space.conditions)
        return uvit.Architecture(**own, channels=channels, grid=grid, num_classes=space.conditions.classes, text=text)
    size, channels = SIZES[model.size], space.shape[-1]
    return releases.Architecture(
        depth=model.depth or size.depth,
        width=model.width or size.width,
        heads=model.heads or size.heads,
        patch=model.patch,
        channels=channels,
        out_channels=2 * channels if model.name == "official_sit" else model.out_channels or channels,
        num_classes=space.conditions.classes,
        mlp_ratio=model.mlp_ratio,
        qk_norm=model.qk_norm,
        skip=model.skip == "release",
    )


def of_run(workdir: str | Path, weights: str = "ema", trust: bool = False) -> tuple[releases.Release, dict[str, int]]:
    """The weights of the last checkpoint of one of our runs.

    weights: one of `trained.WEIGHTS`. trust: see `config.load`.
    """
    found = trained.of_run(workdir, trust=trust)
    model, inputs = found.experiment.config.model, found.experiment.components.objective.inputs
    forms = ("uvit",) if model.name == "uvit" else ("none", "release")
    skip, init = model.get("skip", forms[0]), model.get("skip_init")
    if skip not in forms or (skip == "release" and init == "identity"):
        raise ConfigError(f"config.model.skip = {skip!r} with skip_init = {init!r}: no release has such skips")
    if len(found.space.shape) != 3:
        raise ConfigError(f"its examples have {len(found.space.shape) - 1} axes: no release is of videos or volumes")
    if (base := model.get("base_grid")) not in (None, *found.experiment.components.model.grid):
        raise ConfigError(f"config.model.base_grid = {base}: no release has positions that are spread")
    params = jax.device_get(found.load(found.last, weights))
    parts = found.experiment.components
    arch = architecture(model, network_space(parts.codec, found.space))
    if isinstance(arch, mmdit.Architecture) and skip != "none":
        raise ConfigError(f"config.model.skip = {skip!r}: no release of an MMDiT has skips")
    if (family := releases.other_of(arch)) is not None:
        steps = found.experiment.config.objective.name == "ddpm"
        family += "_discrete" if isinstance(arch, uvit.Architecture) and steps else ""
        sides = arch.sides if isinstance(arch, uvit.Architecture) else None
        return releases.Release(family, arch, sides, params), {weights: len(jax.tree.leaves(params))}
    arch = arch._replace(second_time="span" in inputs, token_width=inputs.get("token", (None,))[0])
    double = "official_sit" if model.name == "official_sit" else "official_dit"
    single = "meanflow_torch" if arch.second_time else "reg" if arch.token_width else "sit"
    family = double if arch.out_channels == 2 * arch.channels else single
    return releases.Release(family, arch, found.space.shape[:2], params), {weights: len(jax.tree.leaves(params))}


def publish(workdir: str | Path, out: Path, weights: str = "ema", trust: bool = False) -> None:
    """Write the last checkpoint of a run as a folder with a model card. weights, trust: as in `of_run`."""
    found = trained.of_run(workdir, trust=trust)
    if configs.holds_run(out) and not exported.holds(out):
        raise ConfigError(f"{out} is the directory of a run: write to another")
    params, entry = jax.device_get(found.load(found.last, weights)), trained.WEIGHTS[weights]
    exported.write(out, found.workdir, params, entry, found.last, build.to_json(found.space))
    model_card.write(out, found, params, weights)
    print(f"{out}: step {found.last}, {sum(array.size for array in jax.tree.leaves(params)):,} numbers")
    for key, path in model_card.paths(found.workdir).items():
        print(f"  its config.json names what others do not have: config.{key} = {path}")
    print(f"sample from it: python -m diversedit_jax.sample --checkpoint={out}")
    print(f"publish it, once its README.md has a license: hf upload OWNER/NAME {out}")


def main(arguments: list[str]) -> None:
    """Read IN; print what it is, or write OUT."""
    given = flags.FLAGS
    if len(arguments) != (1 if given.inspect else 2):
        raise ConfigError("give IN and OUT, or IN and --inspect; --help says more")
    source, weights = arguments[0], "online" if given.online else "ema"
    ours = configs.holds_run(hub.local(source))
    if not given.inspect and not arguments[1].endswith(".safetensors"):
        if not ours or given.to:
            wanted = "a release becomes a .safetensors file; only a run becomes a folder, without --to"
            raise ConfigError(f"OUT = {arguments[1]}: {wanted}")
        publish(source, Path(arguments[1]).expanduser(), weights, given.trust_workdir)
        return
    if ours:
        release, entries = of_run(source, weights, given.trust_workdir)
    else:
        release, entries = releases.open_release(source, given.family, given.heads, given.weights)
    if given.inspect:
        print(describe(release, entries))
        return
    family = given.to or release.family
    arrays = releases.export(release.params, family, release.arch, release.sides)
    write_safetensors(arguments[1], arrays, {"heads": str(release.arch.heads)})
    count = sum(array.size for array in arrays.values())
    print(f"{arguments[1]}: {family}, {len(arrays)} arrays, {count:,} numbers")


if __name__ == "__main__":
    flags.DEFINE_enum("family", None, list(FAMILIES), "The family of IN, where its arrays do not show it.")
    flags.DEFINE_enum("to", None, list(FAMILIES), "The family of OUT; by default that of IN.")
    flags.DEFINE_integer("heads", None, "Attention heads, for a width that no published size has.")
    flags.DEFINE_string("weights", None, "Entry of a training file; by default its EMA.")
    flags.DEFINE_boolean("online", False, "Of a run: take the trained weights instead of their EMA.")
    flags.DEFINE_boolean("trust_workdir", False, "Of a run: run code outside this package that its config names.")
    flags.DEFINE_boolean("inspect", False, "Print what IN is, and write nothing.")
    cli.launch(main, arguments=True)
