"""Convert weights between public releases, or look into them; needs no torch, and runs nothing that a file holds.

    python -m tools.convert_checkpoint SiT-XL-2-256.pt --inspect
    python -m tools.convert_checkpoint repa.pt out.safetensors
    python -m tools.convert_checkpoint DiT-XL-2-256.pt out.safetensors --family=official_dit --to=diffusers_dit

IN is a .safetensors or PyTorch file of a release, a checkpoint of flax or orbax, or the directory of one of our runs
(its EMA weights). OUT is written as .safetensors under the names of the family `--to`, by default that of IN (of a run
`sit` or `meanflow_torch`).
"""

from pathlib import Path

import jax
from absl import flags

from diversedit_jax import config as configs
from diversedit_jax.errors import ConfigError
from diversedit_jax.models.dit import SIZES
from diversedit_jax.runs import trained
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.versions import parameter_overview
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.dit import FAMILIES
from diversedit_jax.weights.formats.weights_file import write_safetensors

FAMILY = flags.DEFINE_enum("family", None, list(FAMILIES), "What IN is, where its arrays do not tell.")
TO = flags.DEFINE_enum("to", None, list(FAMILIES), "What OUT shall be; by default what IN is.")
HEADS = flags.DEFINE_integer("heads", None, "Attention heads, for a width that no published size has.")
WEIGHTS = flags.DEFINE_string("weights", None, "Entry of a training file: by default its EMA.")
INSPECT = flags.DEFINE_boolean("inspect", False, "Print what IN is, and write nothing.")


def describe(release: releases.Release, entries: dict[str, int]) -> str:
    """What a person wants to know of a release."""
    lines = [f"family        {release.family}: {FAMILIES[release.family].about}"]
    lines += [f"{name:<14}{value}" for name, value in release.arch._asdict().items()]
    lines.append(f"{'image side':<14}{release.side or 'not stored'}")
    lines.append(f"{'in the file':<14}{', '.join(f'{name} ({count} arrays)' for name, count in entries.items())}")
    lines.append(
        f"{'EMA':<14}{'present' if {'ema', 'ema_params'} & entries.keys() else 'not named: the arrays may be either'}"
    )
    return "\n".join([*lines, parameter_overview(release.params)])


def of_run(workdir: Path) -> tuple[releases.Release, dict[str, int]]:
    """The EMA weights of the last checkpoint of one of our runs."""
    found = trained.of_run(workdir)
    options, space = found.experiment.config.model, found.space
    size = SIZES[options.size]
    if options.skip not in ("none", "release") or (options.skip == "release" and options.skip_init == "identity"):
        raise ConfigError(f"no release has skips of the form {options.skip!r} with skip_init = {options.skip_init!r}")
    params = found.load(found.steps[-1], "ema")
    side, _, channels = space.shape
    inputs = found.experiment.components.objective.inputs
    arch = releases.Architecture(
        depth=options.depth or size.depth,
        width=options.width or size.width,
        heads=options.heads or size.heads,
        patch=options.patch,
        channels=channels,
        out_channels=2 * channels if options.name == "official_sit" else options.out_channels or channels,
        num_classes=space.conditions.classes,
        mlp_ratio=options.mlp_ratio,
        qk_norm=options.qk_norm,
        skip=options.skip == "release",
        second_time="span" in inputs,
        token_width=inputs.get("token", (None,))[0],
    )
    double = "official_sit" if options.name == "official_sit" else "official_dit"
    single = "meanflow_torch" if arch.second_time else "reg" if arch.token_width else "sit"
    family = double if arch.out_channels == 2 * channels else single
    return releases.Release(family, arch, side, jax.device_get(params)), {"ema": len(jax.tree.leaves(params))}


def main(arguments: list[str]) -> None:
    """Read IN; print what it is, or write OUT."""
    if len(arguments) != (1 if INSPECT.value else 2):
        raise ConfigError("give IN and OUT, or IN and --inspect; --help tells more")
    source = Path(arguments[0])
    if (source / configs.FILE).is_file():
        release, entries = of_run(source)
    else:
        release, entries = releases.open_release(source, FAMILY.value, HEADS.value, WEIGHTS.value)
    if INSPECT.value:
        print(describe(release, entries))
        return
    family = TO.value or release.family
    arrays = releases.export(release.params, family, release.arch, release.side)
    write_safetensors(arguments[1], arrays)
    count = sum(array.size for array in arrays.values())
    print(f"{arguments[1]}: {family}, {len(arrays)} arrays, {count:,} numbers")


if __name__ == "__main__":
    cli.launch(main, arguments=True)
