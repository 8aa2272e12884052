"""Public releases as our models, and our parameters under the names of a release.

The names and shapes of its arrays say which release a file holds. They do not say the number of heads of an unusual
width, nor whether a network with 2 c output channels is a DiT or an official SiT. The user must give those.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diversedit_jax.api import Conditions, Params, Space
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.models import dit
from diversedit_jax.models import patches as model_patches
from diversedit_jax.registry import one_of
from diversedit_jax.weights import dit_names, hub, mapping, mmdit, uvit
from diversedit_jax.weights.dit_names import Architecture, Entry
from diversedit_jax.weights.formats import orbax_folder, weights_folder
from diversedit_jax.weights.mapping import Arrays, Shapes

AnyArchitecture = Architecture | mmdit.Architecture | uvit.Architecture
OTHERS = {"mmdit": mmdit, "uvit": uvit}  # models whose names and architectures have a module of their own


class Family(NamedTuple):
    """How a kind of release is written, and what trained it.

    about:     a description in one line, for users.
    entries:   architecture -> its arrays.
    ignored:   prefixes of names that it may hold besides the network: tables that are computed here, heads of losses.
    double:    whether the output has 2 c channels.
    model:     its name in `models`.
    objective: the name in `objectives` of what trained it. learns: its options, where they are not the defaults.
    """

    about: str
    entries: Callable[[Any], list[Entry]] = dit_names.torch_names
    ignored: tuple[str, ...] = ("pos_embed", "projectors.", "ap_head.")
    double: bool = False
    model: str = "dit"
    objective: str = "flow_matching"
    learns: Mapping[str, Any] = {}


VP_NOISE = {"path": "vp", "prediction": "noise", "time_scale": 999.0}
STEPS = {"betas": "scaled_linear", "first_step": 1, "learn_sigma": False}
FAMILIES = {
    "sit": Family("SiT of REPA, SRA and DiverseDiT: t = 1 is noise"),
    "reg": Family("REG: a SiT of REPA with a class token beside the image", objective="reg"),
    "official_sit": Family("official SiT: t = 0 is noise, 2 c channels", double=True, model="official_sit"),
    "official_dit": Family("official DiT: noise and variance, 1000 steps", double=True, objective="ddpm"),
    "diffusers_dit": Family(
        "DiT in the layout of diffusers",
        dit_names.diffusers_names,
        ("pos_embed.pos_embed",),
        double=True,
        objective="ddpm",
    ),
    "meanflow": Family("official MeanFlow in JAX", dit_names.meanflow_names, ("net/pos_embed",), objective="mean_flow"),
    "meanflow_torch": Family("MeanFlow's port to torch (zhuyu-cs)", objective="mean_flow"),
    "mmdit": Family("MMDiT of REPA: text to image", mmdit.entries, ("pos_embed", "projectors."), model="mmdit"),
    "uvit": Family("U-ViT in continuous time (ImageNet L, CIFAR)", uvit.entries, (), model="uvit", learns=VP_NOISE),
    "uvit_discrete": Family(
        "U-ViT in 1000 steps (ImageNet H, MS-COCO)", uvit.entries, (), model="uvit", objective="ddpm", learns=STEPS
    ),
}
# Parts of a training file, the preferred first: PyTorch's, then those of the official MeanFlow.
ENTRIES = ("ema", "model", "ema_params", "params")
TABLES = ("pos_embed", "net/pos_embed", "pos_embed.pos_embed")  # names of position tables
TABLE_TOLERANCE = 0.01  # bfloat16 rounds values below 1 by at most 0.002
SMALLEST = Architecture(depth=2, width=1, heads=1, patch=1, channels=1, out_channels=1, num_classes=1)


class Release(NamedTuple):
    """A release as parameters of our model: float32 arrays on the host.

    sides: height and width of the image or latent; None if the release stores no position table.
    unread: objects of the file that are not weights, see `NamedArrays.foreign`.
    """

    family: str
    arch: AnyArchitecture
    sides: tuple[int, int] | None
    params: Params
    unread: Mapping[str, str] = {}

    @property
    def model(self) -> dict[str, Any]:
        """The name and options of the model, as a slot of a config has them."""
        return {"name": FAMILIES[self.family].model, **model_options(self.arch)}

    @property
    def objective(self) -> dict[str, Any]:
        """The name and options of the objective that trained it, as a slot of a config has them."""
        width = {} if self.arch.token_width is None else {"width": self.arch.token_width}
        return {"name": FAMILIES[self.family].objective, **FAMILIES[self.family].learns, **width}

    @property
    def scale(self) -> float:
        """By which its latents are multiplied. U-ViT has a number of its own for MS-COCO, its only texts."""
        return 0.23010 if isinstance(self.arch, uvit.Architecture) and self.arch.text else 0.18215

    def sized(self, sides: tuple[int, int] | None) -> "Release":
        """The release for examples of this height and width; None: as it stores them. ConfigError if it cannot."""
        if sides is None:
            return self
        if isinstance(self.arch, uvit.Architecture):  # its position table is learned
            return self._replace(arch=uvit.sized(self.arch, sides), sides=sides)
        return self._replace(sides=sides)

    def space(self, sides: tuple[int, int]) -> Space:
        """The space of its examples, of this height and width. Only of a network that takes labels."""
        return Space((*sides, self.arch.channels), Conditions.labels(self.arch.num_classes))


def recognise(shapes: Shapes) -> str:
    """The family of the arrays with these names and shapes; ConfigError where they do not show it."""
    parts = {re.split("[./]", name)[0] for name in shapes}
    marks = {"net": "meanflow", "transformer_blocks": "diffusers_dit"}
    marks |= {"r_embedder": "meanflow_torch", "cls_projectors2": "reg", "joint_blocks": "mmdit"}
    if "in_blocks" in parts:
        raise ConfigError(
            "a U-ViT of continuous time and one of steps have the same arrays: say --family=uvit or uvit_discrete"
        )
    if {"transformer_blocks", "context_embedder"} <= parts:
        raise ConfigError(
            "this is Stable Diffusion 3 in the layout of diffusers, which is not read: it takes 1000 t and the joined "
            "features of three text encoders, and its last norms give scale before shift; REPA's MMDiT has none of this"
        )
    for part, family in marks.items():
        if part in parts:
            return family
    output = shapes.get("final_layer.linear.weight")
    if "blocks" not in parts or output is None:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"no family known has these arrays ({mapping.few(shapes)}); known: {known}")
    if output[0] == 2 * math.prod(shapes["x_embedder.proj.weight"][1:]):
        raise ConfigError("an official SiT and a DiT have the same arrays: say --family=official_sit or official_dit")
    return "sit"


def architecture(family: str, shapes: Shapes, heads: int | None = None) -> AnyArchitecture:
    """The architecture that the shapes show. heads: needed for a width that no published size has."""
    if FAMILIES[family].model in OTHERS:
        return OTHERS[FAMILIES[family].model].architecture(family, shapes, heads)
    # The arrays that show the sizes have the same names in the smallest architecture.
    names = {(entry.place, entry.layer): entry.name for entry in FAMILIES[family].entries(SMALLEST)}

    def shape(count: int, *place: str, layer: int | None = None) -> tuple[int, ...]:
        return mapping.axes(family, shapes, names[place, layer], count)

    flax = family == "meanflow"  # keeps [in, out], torch [out, in]
    patches = shape(4, "patch_embed", "kernel")
    width, channels, patch, _ = patches[::-1] if flax else patches
    hidden = shape(2, "shallow", "fc1", "kernel", layer=0)[1 if flax else 0]
    output = shape(2, "final", "kernel")[1 if flax else 0]
    labels, _ = shape(2, "label_embed", "embedding")
    prefix, _, _ = names[("shallow", "fc1", "kernel"), 0].partition("0")
    blocks = {re.split("[./]", name.removeprefix(prefix))[0] for name in shapes if name.startswith(prefix)}
    q_norm = shapes.get("blocks.0.attn.q_norm.weight")
    if heads is None:
        published = {size.width: size.heads for size in dit.SIZES.values()}
        heads = width // q_norm[0] if q_norm else published.get(width)
    if heads is None:
        raise ConfigError(f"the number of heads cannot be read from arrays of width {width}: give it with --heads=N")
    if width % heads:
        raise ConfigError(f"heads = {heads} does not divide the width {width}")
    return Architecture(
        depth=len(blocks),
        width=width,
        heads=heads,
        patch=patch,
        channels=channels,
        out_channels=output // patch**2,
        num_classes=labels - 1,
        mlp_ratio=hidden / width,
        qk_norm=q_norm is not None,
        skip="skip_norms.0.weight" in shapes,
        second_time=family.startswith("meanflow"),
        token_width=mapping.axes(family, shapes, "cls_projectors2.weight", 2)[1] if family == "reg" else None,
    )


def model_options(arch: AnyArchitecture) -> dict[str, Any]:
    """The options of the model for an architecture."""
    if not isinstance(arch, Architecture):
        return arch.options
    options = {name: getattr(arch, name) for name in ("depth", "width", "heads", "patch", "mlp_ratio", "qk_norm")}
    return options | {"skip": "release" if arch.skip else "none", "out_channels": arch.out_channels}


def inputs(arch: AnyArchitecture) -> dict[str, tuple[int, ...]]:
    """The inputs of a network besides x_t, t and y, as `Objective.inputs`."""
    span = {"span": ()} if arch.second_time else {}
    return span | ({} if arch.token_width is None else {"token": (arch.token_width,)})


def abstract(arch: AnyArchitecture) -> Params:
    """The shapes of our parameters for an architecture. Only those of a U-ViT depend on the side of the image."""
    if (other := other_of(arch)) is not None:
        return OTHERS[other].abstract(arch)
    space = Space((arch.patch, arch.patch, arch.channels), Conditions.labels(arch.num_classes))
    model = dit.make(space, inputs(arch), **model_options(arch))
    return jax.eval_shape(model.init, jax.random.key(0))


def other_of(arch: AnyArchitecture) -> str | None:
    """The model of an architecture, if it is one of OTHERS."""
    return next((name for name, module in OTHERS.items() if isinstance(arch, module.Architecture)), None)


def load(
    arrays: Mapping[str, np.ndarray], shapes: Shapes, family: str | None = None, heads: int | None = None
) -> Release:
    """The release in `arrays`. Each array is read once, one at a time, into its place.

    Every array must be there, fit, and be known: ConfigError names the first that is missing, misshapen or left over.
    """
    family = one_of("family", family or recognise(shapes), FAMILIES)
    arch = architecture(family, shapes, heads)
    if FAMILIES[family].double != (arch.out_channels == 2 * arch.channels):
        wanted = (1 + FAMILIES[family].double) * arch.channels
        raise ConfigError(f"{family} has {wanted} output channels, these arrays {arch.out_channels}")
    entries = FAMILIES[family].entries(arch)
    target = abstract(arch)
    mapping.check(family, entries, shapes, target, FAMILIES[family].ignored)
    if isinstance(arch, uvit.Architecture):  # its table is learned
        sides = arch.sides
    else:
        sides = sides_of(family, arrays[found], arch) if (found := next(filter(shapes.get, TABLES), None)) else None
    return Release(family, arch, sides, mapping.fill(family, entries, arrays, target))


def position_table(arch: AnyArchitecture, grid: tuple[int, ...]) -> np.ndarray:
    """The position table that a release stores, [n d]: a row of zeros for a class token, then those of the patches."""
    return np.pad(model_patches.position_table(grid, arch.width), ((int(arch.token_width is not None), 0), (0, 0)))


def sides_of(family: str, table: np.ndarray, arch: AnyArchitecture) -> tuple[int, int]:
    """The height and width of the images whose position table [1 n d] a release stores. Of an MMDiT, the largest.

    ConfigError for another table than the fixed one: our network would not be the one that was trained.
    """
    patches = math.prod(table.shape[:-1]) - int(arch.token_width is not None)
    if table.ndim < 2 or table.shape[-1] != arch.width or patches < 1:
        raise ConfigError(f"{family}: its position table has shape {list(table.shape)}, wanted [1, n, {arch.width}]")
    stored = np.asarray(table, np.float32).reshape(-1, arch.width)
    grids = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    apart = {grid: float(np.abs(position_table(arch, grid) - stored).max()) for grid in grids}
    nearest = min(apart, key=apart.get)
    if not apart[nearest] < TABLE_TOLERANCE:
        raise ConfigError(
            f"{family}: its position table is not the fixed sine-cosine table of any grid of {patches} patches. It "
            f"differs by up to {apart[nearest]:.2g} from that of {nearest[0]} x {nearest[1]}: a learned or resized "
            "table is not read"
        )
    return arch.patch * nearest[0], arch.patch * nearest[1]


def export(
    params: Params, family: str, arch: AnyArchitecture, sides: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """Our parameters under the names of a family, C-contiguous float32; with `sides`, the position table it stores."""
    kind = FAMILIES[one_of("family", family, FAMILIES)]
    if other_of(arch) != (kind.model if kind.model in OTHERS else None):
        raise ConfigError(f"{family} cannot hold this network: it is a {other_of(arch) or 'dit'}")
    if isinstance(arch, uvit.Architecture):
        return mapping.written(kind.entries(arch), params)
    if isinstance(arch, mmdit.Architecture):
        table = position_table(arch, (arch.table, arch.table))
        return mapping.written(kind.entries(arch), params) | {"pos_embed": table[None]}
    torch = kind.entries is dit_names.torch_names
    if kind.double != (arch.out_channels == 2 * arch.channels):
        raise ConfigError(f"{family} cannot hold a network of {arch.channels} to {arch.out_channels} channels")
    if not torch and (arch.skip or arch.qk_norm):
        raise ConfigError(f"{family} has no long residual connections and no q and k norms")
    for part, present, wanted in [
        ("a second time", arch.second_time, family.startswith("meanflow")),
        ("a class token", arch.token_width is not None, family == "reg"),
    ]:
        if present != wanted:
            raise ConfigError(f"{family} cannot hold a network {'with' if present else 'without'} {part}")
    arrays = mapping.written(kind.entries(arch), params)
    if sides is not None and torch:
        arrays["pos_embed"] = position_table(arch, tuple(side // arch.patch for side in sides))[None]
    return arrays


def open_release(
    path: str | Path, family: str | None = None, heads: int | None = None, weights: str | None = None
) -> tuple[Release, dict[str, int]]:
    """The release in a weight file, a folder of diffusers or one of orbax, and the number of arrays in each part of it.

    path:  also a name on the hub, see `weights.hub`.
    heads: as for `architecture`; by default as the file or a config.json beside it says.
    weights: the part of a training file to take, by default the first of ENTRIES that it has, else the whole file. The
        other parts (the optimizer's state) are not read.
    Raises WeightsError for a file without weights, ConfigError for weights that do not fit.
    """
    path = hub.local(path)
    folder, path = orbax_folder.find(path), weights_folder.folder_of(path, "transformer")
    with weights_folder.opened(path) if folder is None else orbax_folder.OrbaxFolder(folder) as file:
        heads = heads or weights_folder.config(path).get("num_attention_heads") or file.about.get("heads")
        top = dict.fromkeys(name.partition(".")[0] for name in file)
        parts = {name: len(file.names(name)) for name in top if isinstance(file.tree.get(name), Mapping)}
        chosen = weights or next((name for name in ENTRIES if name in parts or name in file.foreign), "")
        if chosen in file.foreign:
            of = f"an object of {file.foreign[chosen]}"
            others = f"; give another entry with --weights: {', '.join(parts)}" if parts else ""
            raise WeightsError(f"{path}: its entry {chosen!r} is {of}, which is not read{others}")
        if chosen and chosen not in parts:
            raise ConfigError(f"{path} has no entry {chosen!r}; it has {', '.join(parts) or 'bare arrays'}")
        blocks = {found[1] for name in file.names(chosen) if (found := re.search(r"(?:^|\.)blocks\.(\d+)\.", name))}
        arrays = Arrays(file, chosen, partial(_current, len(blocks)))
        release = load(arrays, arrays.shapes, family, heads and int(heads))._replace(unread=file.foreign)
        return release, parts or {"arrays": len(file)}


def _current(blocks: int, name: str) -> str:
    """The name as `weights.dit_names` has it: of flax with slashes, of REPA with one count of all blocks.

    REPA's first files count the blocks behind the projector anew, as `decoder_blocks`, after so many `blocks`.
    """
    first, _, rest = name.partition(".")
    if first == "net":
        return name.replace(".", "/")
    if first == "decoder_blocks":
        index, _, rest = rest.partition(".")
        return f"blocks.{blocks + int(index)}.{rest}"
    return name
