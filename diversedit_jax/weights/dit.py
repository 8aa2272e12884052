"""Public releases as our models, and our parameters under a release's names.

A release is recognised from the names and shapes of its arrays. What they cannot tell is asked for: the number of heads
of an unusual width, and whether a network with 2 c output channels is a DiT or an official SiT.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diversedit_jax.api import Conditions, Params, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import dit
from diversedit_jax.registry import one_of
from diversedit_jax.weights import dit_names, mapping
from diversedit_jax.weights.dit_names import Architecture, Entry
from diversedit_jax.weights.formats import orbax_folder
from diversedit_jax.weights.formats.weights_file import open_weights
from diversedit_jax.weights.mapping import Arrays


class Family(NamedTuple):
    """How a kind of release is written, and what trained it.

    about:     what it is, in a line.
    entries:   its arrays, for an architecture.
    aside:     beginnings of names that it holds besides the network: tables that are computed here, heads of losses.
    double:    whether the output has 2 c channels.
    model:     whose parameters they are, a name of `models`.
    objective: what trained it, a name of `objectives`.
    """

    about: str
    entries: Callable[[Architecture], list[Entry]]
    aside: tuple[str, ...]
    double: bool = False
    model: str = "dit"
    objective: str = "flow_matching"


# Of training files: PyTorch's, then those of the official MeanFlow, which saves one device's copy of its state.
ENTRIES = ("ema", "model", "ema_params", "params")
HEADS = ("pos_embed", "projectors.", "ap_head.")
TORCH = dit_names.torch_names
FAMILIES = {
    "sit": Family("SiT of REPA, SRA and DiverseDiT: t = 1 is noise", TORCH, HEADS),
    "reg": Family("REG: a SiT of REPA with a class token beside the image", TORCH, HEADS, objective="reg"),
    "official_sit": Family(
        "official SiT: t = 0 is noise, 2 c channels", TORCH, HEADS, double=True, model="official_sit"
    ),
    "official_dit": Family("official DiT: noise and variance, 1000 steps", TORCH, HEADS, double=True, objective="ddpm"),
    "diffusers_dit": Family(
        "DiT in the layout of diffusers",
        dit_names.diffusers_names,
        ("pos_embed.pos_embed",),
        double=True,
        objective="ddpm",
    ),
    "meanflow": Family("official MeanFlow in JAX", dit_names.meanflow_names, ("net/pos_embed",), objective="mean_flow"),
    "meanflow_torch": Family("MeanFlow's port to torch (zhuyu-cs)", TORCH, HEADS, objective="mean_flow"),
}


class Release(NamedTuple):
    """A release as parameters of our model: float32 arrays on the host.

    side: of the image or latent, where the release stores its position table; else None.
    """

    family: str
    arch: Architecture
    side: int | None
    params: Params

    @property
    def model(self) -> dict[str, Any]:
        """The model: its name and options, as a slot of a config has them."""
        return {"name": FAMILIES[self.family].model, **model_options(self.arch)}

    @property
    def objective(self) -> dict[str, Any]:
        """What trained it: name and options, as a slot of a config has them."""
        width = {} if self.arch.token_width is None else {"width": self.arch.token_width}
        return {"name": FAMILIES[self.family].objective, **width}

    def space(self, side: int) -> Space:
        """Where its examples live: squares of this side."""
        return Space((side, side, self.arch.channels), Conditions.labels(self.arch.num_classes))


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
    return options | {"skip": "release" if arch.skip else "none", "out_channels": arch.out_channels}


def inputs(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """What a network of an architecture takes besides x_t, t and y."""
    span = {"span": ()} if arch.second_time else {}
    return span | ({} if arch.token_width is None else {"token": (arch.token_width,)})


def abstract(arch: Architecture) -> Params:
    """Our parameters of an architecture, as shapes. They do not depend on the side of the image."""
    space = Space((arch.patch, arch.patch, arch.channels), Conditions.labels(arch.num_classes))
    model = dit.make(space, inputs(arch), **model_options(arch))
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
    family = one_of("family", family or recognise(shapes), FAMILIES)
    arch = architecture(family, shapes, heads)
    if FAMILIES[family].double != (arch.out_channels == 2 * arch.channels):
        wanted = (1 + FAMILIES[family].double) * arch.channels
        raise ConfigError(f"{family} has {wanted} output channels, these arrays {arch.out_channels}")
    entries = FAMILIES[family].entries(arch)
    target = abstract(arch)
    mapping.check(family, entries, shapes, target, FAMILIES[family].aside)
    params = mapping.fill(family, entries, arrays, jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), target))
    table = next((shapes[name] for name in ("pos_embed", "net/pos_embed") if name in shapes), None)
    first = 1 if family == "reg" else 0  # the class token's row
    side = arch.patch * round((table[-2] - first) ** 0.5) if table else None
    return Release(family, arch, side, params)


def export(params: Params, family: str, arch: Architecture, side: int | None = None) -> dict[str, np.ndarray]:
    """Our parameters under the names of a family, C-contiguous float32; with `side`, the position table it stores."""
    one_of("family", family, FAMILIES)
    if FAMILIES[family].double != (arch.out_channels == 2 * arch.channels):
        raise ConfigError(f"{family} cannot hold a network of {arch.channels} to {arch.out_channels} channels")
    if FAMILIES[family].entries is not dit_names.torch_names and (arch.skip or arch.qk_norm):
        raise ConfigError(f"{family} has no long residual connections and no q and k norms")
    has = {"a second time": arch.second_time, "a class token": arch.token_width is not None}
    holds = {"a second time": family.startswith("meanflow"), "a class token": family == "reg"}
    for part in has:
        if has[part] != holds[part]:
            raise ConfigError(f"{family} cannot hold a network {'with' if has[part] else 'without'} {part}")
    arrays = mapping.written(FAMILIES[family].entries(arch), params)
    if side is not None and FAMILIES[family].entries is dit_names.torch_names:
        table = dit.position_table((side // arch.patch,) * 2, arch.width)
        first = 1 if family == "reg" else 0  # the class token's row
        arrays["pos_embed"] = np.pad(table, ((first, 0), (0, 0)))[None]
    return arrays


def open_release(
    path: Path, family: str | None = None, heads: int | None = None, weights: str | None = None
) -> tuple[Release, dict[str, int]]:
    """The release in a weight file, or in an orbax folder; and how many arrays each of its entries has.

    weights: the entry of a training file to take, by default the first of ENTRIES that it has, else the whole file. The
    others (the optimizer's half) are not read. Raises WeightsError for what holds no weights, ConfigError for what does
    not fit.
    """
    folder = orbax_folder.find(path) if path.is_dir() else None
    with open_weights(path) if folder is None else orbax_folder.OrbaxFolder(folder) as file:
        top = dict.fromkeys(name.partition(".")[0] for name in file)
        parts = {name: len(file.names(name)) for name in top if isinstance(file.tree.get(name), Mapping)}
        chosen = weights or next((name for name in ENTRIES if name in parts), "")
        if chosen and chosen not in parts:
            raise ConfigError(f"{path} has no entry {chosen!r}; it has {', '.join(parts) or 'bare arrays'}")
        blocks = {found[1] for name in file.names(chosen) if (found := re.search(r"(?:^|\.)blocks\.(\d+)\.", name))}
        arrays = Arrays(file, chosen, partial(_current, len(blocks)))
        return load(arrays, arrays.shapes, family, heads), parts or {"arrays": len(file)}


def _current(blocks: int, name: str) -> str:
    """The name as `weights.dit_names` has it.

    Trees of flax are written with slashes there. REPA's first files count the blocks behind the projector anew, as
    `decoder_blocks`, after so many `blocks`.
    """
    first, _, rest = name.partition(".")
    if first == "net":
        return name.replace(".", "/")
    if first == "decoder_blocks":
        index, _, rest = rest.partition(".")
        return f"blocks.{blocks + int(index)}.{rest}"
    return name
