"""Public releases as our models, and our parameters under a release's names.

A release is recognised from the names and shapes of its arrays. What they cannot tell is asked for: the number of heads
of an unusual width, and whether a network with 2 c output channels is a DiT or an official SiT.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.interop import names
from diversedit_jax.interop.names import Architecture, Entry
from diversedit_jax.interop.weights_file import WeightsFile, open_weights
from diversedit_jax.models import dit
from diversedit_jax.slots import suggestion


class Family(NamedTuple):
    """How a kind of release is written.

    entries:  its arrays, for an architecture.
    aside:    beginnings of names that it holds beside the network: tables that are computed here, heads of losses.
    double:   whether the output has 2 c channels.
    about:    what it is, in a line.
    """

    entries: Callable[[Architecture], list[Entry]]
    aside: tuple[str, ...]
    double: bool
    about: str


HEADS = ("pos_embed", "projectors.", "ap_head.")
FAMILIES = {
    "sit": Family(names.torch_names, HEADS, False, "SiT of REPA, SRA and DiverseDiT: t = 1 is noise"),
    "reg": Family(names.torch_names, HEADS, False, "REG: a SiT of REPA with a class token beside the image"),
    "official_sit": Family(names.torch_names, HEADS, True, "official SiT: t = 0 is noise, 2 c channels"),
    "official_dit": Family(names.torch_names, HEADS, True, "official DiT: noise and variance, 1000 steps"),
    "diffusers_dit": Family(names.diffusers_names, ("pos_embed.pos_embed",), True, "DiT in the layout of diffusers"),
    "meanflow": Family(names.meanflow_names, ("net/pos_embed",), False, "official MeanFlow in JAX"),
    "meanflow_torch": Family(names.torch_names, HEADS, False, "MeanFlow's port to torch"),
}


class Release(NamedTuple):
    """A release as parameters of `models.dit`: float32 arrays on the host."""

    family: str
    arch: Architecture
    side: int | None  # of the image or latent, where the release stores its position table
    params: Params


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The family of the arrays with these names and shapes; ConfigError where it cannot be told."""
    found = [name.split(".")[0].split("/")[0] for name in shapes]
    if "net" in found:
        return "meanflow"
    if "transformer_blocks" in found:
        return "diffusers_dit"
    if "r_embedder" in found:
        return "meanflow_torch"
    if "cls_projectors2" in found:
        return "reg"
    if "blocks" not in found or "final_layer.linear.weight" not in shapes:
        few = ", ".join(list(shapes)[:3]) or "nothing"
        raise ConfigError(f"no family known has these arrays ({few}, ...); known: {', '.join(FAMILIES)}")
    patches, final = shapes["x_embedder.proj.weight"], shapes["final_layer.linear.weight"]
    if final[0] == 2 * int(np.prod(patches[1:])):
        raise ConfigError("an official SiT and a DiT have the same arrays: say --family=official_sit or official_dit")
    return "sit"


def architecture(family: str, shapes: Mapping[str, tuple[int, ...]], heads: int | None = None) -> Architecture:
    """The architecture that the shapes tell. `heads`: of a width that no published size has."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes:
            raise ConfigError(f"{family}: the array {name} is missing")
        if len(shapes[name]) != rank:
            raise ConfigError(f"{family}: {name} has shape {list(shapes[name])}, wanted {rank} axes")
        return shapes[name]

    if family == "meanflow":
        patch, _, channels, width = shape("net/x_embedder/proj/kernel", 4)
        hidden = shape("net/blocks/layers_0/mlp/fc1/_flax_linear/kernel", 2)[1]
        final = shape("net/final_layer/linear/_flax_linear/kernel", 2)[1]
        labels = shape("net/y_embedder/embedding_table/_flax_embedding/embedding", 2)[0]
        blocks = {name.split("/")[2] for name in shapes if name.startswith("net/blocks/")}
    else:
        diffusers = family == "diffusers_dit"
        block = "transformer_blocks" if diffusers else "blocks"
        table = (
            f"{block}.0.norm1.emb.class_embedder.embedding_table.weight"
            if diffusers
            else "y_embedder.embedding_table.weight"
        )
        width, channels, patch, _ = shape("pos_embed.proj.weight" if diffusers else "x_embedder.proj.weight", 4)
        hidden = shape(f"{block}.0.ff.net.0.proj.weight" if diffusers else f"{block}.0.mlp.fc1.weight", 2)[0]
        final = shape("proj_out_2.weight" if diffusers else "final_layer.linear.weight", 2)[0]
        labels = shape(table, 2)[0]
        blocks = {name.split(".")[1] for name in shapes if name.startswith(f"{block}.")}
    if heads is None:
        known = {size.width: size.heads for size in dit.SIZES.values()}
        head_width = shapes.get("blocks.0.attn.q_norm.weight", (None,))[0]
        heads = width // head_width if head_width else known.get(width)
        if heads is None:
            raise ConfigError(
                f"the number of heads cannot be read from arrays of width {width}: give it with --heads=N"
            )
    if width % heads:
        raise ConfigError(f"heads = {heads} does not divide the width {width}")
    return Architecture(
        depth=len(blocks),
        width=width,
        heads=heads,
        patch=patch,
        channels=channels,
        out_channels=final // patch**2,
        num_classes=labels - 1,
        mlp_ratio=hidden / width,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        skip="skip_norms.0.weight" in shapes,
        second_time=family.startswith("meanflow"),
        token_width=shape("cls_projectors2.weight", 2)[1] if family == "reg" else None,
    )


def model_options(arch: Architecture) -> dict[str, Any]:
    """The options of `models.dit.make` for an architecture."""
    options = {name: getattr(arch, name) for name in ("depth", "width", "heads", "patch", "mlp_ratio", "qk_norm")}
    options |= {"skip": "release" if arch.skip else "none", "out_channels": arch.out_channels}
    options |= {"second_time": True} if arch.second_time else {}
    return options | ({} if arch.token_width is None else {"token_width": arch.token_width})


def abstract(arch: Architecture) -> Params:
    """Our parameters of an architecture as shapes. (Those of the position table's image do not depend on its side.)"""
    model = dit.make((arch.patch, arch.patch, arch.channels), arch.num_classes, **model_options(arch))
    return jax.eval_shape(model.init, jax.random.key(0))


def load(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    family: str | None = None,
    heads: int | None = None,
) -> Release:
    """The release in `arrays`, each of them read once, one at a time, into place.

    Every array must be there, fit, and be known: ConfigError names the first that is missing, misshapen or left over.
    """
    family = family or recognise(shapes)
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; {suggestion(family, FAMILIES)}")
    arch = architecture(family, shapes, heads)
    if FAMILIES[family].double != (arch.out_channels == 2 * arch.channels):
        wanted = (1 + FAMILIES[family].double) * arch.channels
        raise ConfigError(f"{family} has {wanted} output channels, these arrays {arch.out_channels}")
    entries = FAMILIES[family].entries(arch)
    target = abstract(arch)
    _check(family, entries, shapes, target)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), target)
    filled: set[tuple] = set()
    for entry in entries:
        place = _place(params, entry)
        ours = entry.turn.ours(np.asarray(arrays[entry.name], np.float32))
        key = (entry.place, entry.layer, entry.part)
        if key in filled and not np.array_equal(place, ours):
            raise ConfigError(f"{family}: {entry.name} differs from its copies in other blocks: the model has one")
        place[...] = ours
        filled.add(key)
    table = next((shapes[name] for name in ("pos_embed", "net/pos_embed") if name in shapes), None)
    first = 1 if family == "reg" else 0  # the class token's row
    side = arch.patch * round((table[-2] - first) ** 0.5) if table else None
    return Release(family, arch, side, params)


def export(params: Params, family: str, arch: Architecture, side: int | None = None) -> dict[str, np.ndarray]:
    """Our parameters under the names of a family, C-contiguous float32; with `side`, the position table it stores."""
    if family not in FAMILIES:
        raise ConfigError(f"unknown family {family!r}; {suggestion(family, FAMILIES)}")
    if FAMILIES[family].double != (arch.out_channels == 2 * arch.channels):
        raise ConfigError(f"{family} cannot hold a network of {arch.channels} to {arch.out_channels} channels")
    if family == "diffusers_dit" and (arch.skip or arch.qk_norm):
        raise ConfigError("the layout of diffusers has no long residual connections and no q and k norms")
    has = {"a second time": arch.second_time, "a class token": arch.token_width is not None}
    holds = {"a second time": family.startswith("meanflow"), "a class token": family == "reg"}
    for part in has:
        if has[part] != holds[part]:
            raise ConfigError(f"{family} cannot hold a network {'with' if has[part] else 'without'} {part}")
    arrays = {
        entry.name: np.array(entry.turn.theirs(np.asarray(_place(params, entry))), order="C")
        for entry in FAMILIES[family].entries(arch)
    }
    if side is not None and FAMILIES[family].entries is names.torch_names:
        table = dit.position_table((side, side, arch.channels), arch.patch, arch.width)
        first = 1 if family == "reg" else 0  # the class token's row
        arrays["pos_embed"] = np.pad(table, ((first, 0), (0, 0)))[None]
    return arrays


def _place(params: Params, entry: Entry) -> np.ndarray:
    """A view of where an entry's array goes."""
    for name in entry.place:
        params = params[name]
    array = params if entry.layer is None else params[entry.layer]
    if entry.part is None:
        return array
    return array[entry.part] if entry.place[-1] == "bias" else array[:, entry.part]


def _check(family: str, entries: list[Entry], shapes: Mapping[str, tuple[int, ...]], target: Params) -> None:
    """Names and shapes of all arrays, before one of them is read."""
    wanted = {}
    for entry in entries:
        ours = np.broadcast_to(np.float32(0), _shape(target, entry))
        wanted[entry.name] = entry.turn.theirs(ours).shape
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted and not name.startswith(FAMILIES[family].aside)]
    wrong = [name for name in wanted if name in shapes and tuple(shapes[name]) != wanted[name]]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{family}: the array {missing[0]} {list(wanted[missing[0]])} is missing{more}")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ConfigError(f"{family}: the array {extra[0]} {list(shapes[extra[0]])} is not known{more}")
    if wrong:
        name = wrong[0]
        raise ConfigError(f"{family}: {name} has shape {list(shapes[name])}, wanted {list(wanted[name])}")


def _shape(target: Params, entry: Entry) -> tuple[int, ...]:
    for name in entry.place:
        target = target[name]
    shape = target.shape if entry.layer is None else target.shape[1:]
    if entry.part is None:
        return shape
    return shape[1:] if entry.place[-1] == "bias" else (shape[0], *shape[2:])


def open_release(
    path: Path, family: str | None = None, heads: int | None = None, weights: str | None = None
) -> tuple[Release, dict[str, int]]:
    """The release in a weight file, and how many arrays each of the file's entries has.

    weights: the entry of a training file to take, by default `ema`, else `model`, else the whole file. The others (the
    optimizer's half) are not read. Raises WeightsError for what is no weight file, ConfigError for what does not fit.
    """
    with open_weights(path) as file:
        top = dict.fromkeys(name.partition(".")[0] for name in file)
        parts = {name: len(file.names(name)) for name in top if isinstance(file.tree.get(name), Mapping)}
        chosen = weights or next((name for name in ("ema", "model") if name in parts), "")
        if chosen and chosen not in parts:
            raise ConfigError(f"{path} has no entry {chosen!r}; it has {', '.join(parts) or 'bare arrays'}")
        arrays = _Entry(file, chosen)
        return load(arrays, arrays.shapes, family, heads), parts or {"arrays": len(file)}


class _Entry(Mapping):
    """The arrays below one entry of a weight file, by the rest of their names, read when they are asked for."""

    def __init__(self, file: WeightsFile, prefix: str):
        names = file.names(prefix)
        rest = [name.removeprefix(f"{prefix}.") if prefix else name for name in names]
        if all(name.startswith("module.") for name in rest):  # as torch's data-parallel wrappers save
            rest = [name.removeprefix("module.") for name in rest]
        self._file, self._names = file, dict(zip(rest, names, strict=True))
        self.shapes = {short: file.shape(name) for short, name in self._names.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file.read(self._names[name])

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
