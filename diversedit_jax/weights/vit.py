"""Published image encoders as parameters of `models.vit`.

Layouts differ only in names, so each is one row of names. Shapes show what distinguishes the networks.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import vit
from diversedit_jax.models.vit import Architecture
from diversedit_jax.registry import one_of
from diversedit_jax.weights import hub, mapping
from diversedit_jax.weights.dit_names import SAME, Entry, Turn, conv, heads_of, linear, norm
from diversedit_jax.weights.formats import NamedArrays, weights_folder
from diversedit_jax.weights.mapping import Arrays, Shapes


class Layout(NamedTuple):
    """The names of a kind of file. Names inside of a block follow `blocks` and a number.

    qkv:   one name, or three; with the dot or underscore before `weight`.
    mlp:   fc1 and fc2. gated: those of SwiGLU.
    flat:  the class token is [d] and the position table [n d], without leading axes of length 1.
    """

    patch: str
    position: str
    class_token: str
    blocks: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    proj: str
    mlp: tuple[str, str]
    norm: str
    pre_norm: str = ""
    registers: str = ""
    scales: tuple[str, str] = ("", "")
    gated: tuple[str, str] = ("", "")
    flat: bool = False


HF_VIT = Layout(  # ViTModel of transformers
    patch="embeddings.patch_embeddings.projection",
    position="embeddings.position_embeddings",
    class_token="embeddings.cls_token",
    blocks="encoder.layer",
    norms=("layernorm_before", "layernorm_after"),
    qkv=("attention.attention.query.", "attention.attention.key.", "attention.attention.value."),
    proj="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    norm="layernorm",
)
LAYOUTS = {
    "original": Layout(  # DINOv2, DINO, MAE, MoCo v3 and I-JEPA as their authors publish them
        patch="patch_embed.proj",
        position="pos_embed",
        class_token="cls_token",
        blocks="blocks",
        norms=("norm1", "norm2"),
        qkv=("attn.qkv.",),
        proj="attn.proj",
        mlp=("mlp.fc1", "mlp.fc2"),
        norm="norm",
        registers="register_tokens",
        scales=("ls1.gamma", "ls2.gamma"),
        gated=("mlp.w12", "mlp.w3"),
    ),
    "hf_dinov2": HF_VIT._replace(  # Dinov2Model and Dinov2WithRegistersModel of transformers
        norms=("norm1", "norm2"),
        mlp=("mlp.fc1", "mlp.fc2"),
        registers="embeddings.register_tokens",
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        gated=("mlp.weights_in", "mlp.weights_out"),
    ),
    "hf_vit": HF_VIT,
    "hf_clip": Layout(  # CLIPModel and CLIPVisionModel of transformers, which misspell the first norm
        patch="vision_model.embeddings.patch_embedding",
        position="vision_model.embeddings.position_embedding.weight",
        class_token="vision_model.embeddings.class_embedding",
        blocks="vision_model.encoder.layers",
        norms=("layer_norm1", "layer_norm2"),
        qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
        proj="self_attn.out_proj",
        mlp=("mlp.fc1", "mlp.fc2"),
        norm="vision_model.post_layernorm",
        pre_norm="vision_model.pre_layrnorm",
        flat=True,
    ),
    "clip": Layout(  # a state dict of OpenAI's CLIP
        patch="visual.conv1",
        position="visual.positional_embedding",
        class_token="visual.class_embedding",
        blocks="visual.transformer.resblocks",
        norms=("ln_1", "ln_2"),
        qkv=("attn.in_proj_",),
        proj="attn.out_proj",
        mlp=("mlp.c_fc", "mlp.c_proj"),
        norm="visual.ln_post",
        pre_norm="visual.ln_pre",
        flat=True,
    ),
}


class Kind(NamedTuple):
    """What all releases of an encoder share. The fields after `rename` are those of `vit.Architecture`.

    layouts: those in which it is published.
    heads:   width -> number of heads, which no shape shows.
    entry:   the part of a training file that holds it. A file without this part may hold the arrays alone.
    ignored: prefixes of names that are not the encoder's.
    rename:  changes names below the entry.
    """

    name: str
    layouts: tuple[str, ...]
    heads: Mapping[int, int]
    entry: str = ""
    ignored: tuple[str, ...] = ()
    rename: Callable[[str], str] = str
    class_token: bool = True
    layer_scale: bool = False
    final_norm: bool = True
    activation: str = "gelu"
    eps: float = 1e-6


class Release(NamedTuple):
    """An encoder in a file. read: () -> parameters on the host."""

    arch: Architecture
    read: Callable[[], Params]


HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24}  # of ViT-S, B, L, H, and g of I-JEPA, of DINOv2


def entries(layout: str, arch: Architecture) -> list[Entry]:
    """The arrays of an architecture in a layout."""
    names = LAYOUTS[layout]
    row, table = (SAME, SAME) if names.flat else (_lead(2), _lead(1))
    found = [
        Entry(("patch_embed", "kernel"), None, f"{names.patch}.weight", conv(arch.patch)),
        Entry(("position",), None, names.position, table),
    ]
    if not arch.pre_norm:
        found.append(Entry(("patch_embed", "bias"), None, f"{names.patch}.bias", SAME))
    if arch.class_token:
        found.append(Entry(("class_token",), None, names.class_token, row))
    if arch.registers:
        found.append(Entry(("registers",), None, names.registers, _lead(1)))
    if arch.pre_norm:
        found += norm(("pre_norm",), names.pre_norm)
    if arch.final_norm:
        found += norm(("norm",), names.norm)
    joint = len(names.qkv) == 1
    turns = heads_of(arch.width, arch.heads, (3,) if joint else ())
    mlp = names.gated if arch.swiglu else names.mlp
    for i in range(arch.depth):
        block = f"{names.blocks}.{i}"
        for ours, theirs in zip(("norm1", "norm2"), names.norms, strict=True):
            found += norm(("blocks", ours), f"{block}.{theirs}", i)
        for ours, theirs in zip(("proj", "fc1", "fc2"), (names.proj, *mlp), strict=True):
            found += linear(("blocks", ours), f"{block}.{theirs}", i)
        for leaf, suffix, turn in zip(("kernel", "bias"), ("weight", "bias"), turns, strict=True):
            for part, name in enumerate(names.qkv):
                place = ("blocks", "qkv", leaf)
                found.append(Entry(place, i, f"{block}.{name}{suffix}", turn, None if joint else part))
        if arch.layer_scale:
            for ours, theirs in zip(("scale1", "scale2"), names.scales, strict=True):
                found.append(Entry(("blocks", ours), i, f"{block}.{theirs}", SAME))
    return found


def _lead(axes: int) -> Turn:
    """Leading axes of length 1, which we drop."""
    return Turn(lambda x: x.reshape(x.shape[axes:]), lambda x: x.reshape((1,) * axes + x.shape))


def architecture(kind: Kind, layout: str, shapes: Shapes, heads: int | None = None) -> Architecture:
    """The architecture that the shapes of a file show. heads: needed for a width that no published encoder has."""
    names = LAYOUTS[layout]
    shape = partial(mapping.axes, kind.name, shapes)
    width, channels, patch, _ = shape(f"{names.patch}.weight", 4)
    first = f"{names.blocks}.0."
    swiglu = bool(names.gated[1]) and f"{first}{names.gated[1]}.weight" in shapes
    hidden = shape(f"{first}{(names.gated if swiglu else names.mlp)[1]}.weight", 2)[1]
    prefix = f"{names.blocks}."
    blocks = {name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)}
    places = shape(names.position, 2 if names.flat else 3)[-2]
    side = round((places - kind.class_token) ** 0.5)
    if side**2 + kind.class_token != places:
        square = "a class token and a square of patches" if kind.class_token else "a square of patches"
        raise ConfigError(f"{kind.name}: {names.position} has {places} places, which are not {square}")
    heads = kind.heads.get(width) if heads is None else heads
    if heads is None:
        raise ConfigError(f"{kind.name}: the number of heads cannot be read from arrays of width {width}: set heads")
    return Architecture(
        depth=len(blocks),
        width=width,
        heads=heads,
        hidden=hidden,
        patch=patch,
        channels=channels,
        side=side,
        class_token=kind.class_token,
        registers=shape(names.registers, 3)[1] if names.registers in shapes else 0,
        layer_scale=kind.layer_scale,
        swiglu=swiglu,
        pre_norm=bool(names.pre_norm),
        final_norm=kind.final_norm,
        activation=kind.activation,
        eps=kind.eps,
    )


def recognise(kind: Kind, shapes: Shapes) -> str:
    """The layout of a file of this kind; ConfigError if it has none of the published ones."""
    for layout in kind.layouts:
        names = LAYOUTS[layout]
        if f"{names.patch}.weight" in shapes and f"{names.blocks}.0.{names.norms[0]}.weight" in shapes:
            return layout
    wanted = " or ".join(f"{LAYOUTS[layout].patch}.weight" for layout in kind.layouts)
    where = f" at the top or below {kind.entry!r}" if kind.entry else ""
    raise ConfigError(f"{kind.name}: these are not its arrays ({mapping.few(shapes)}): wanted {wanted}{where}")


def open_encoder(
    kind: Kind, file: str | Path, heads: int | None = None, position: str = "repa", dtype: str = "float32"
) -> Release:
    """The encoder of a kind in a weight file, or in a folder of transformers; or named as on the hub.

    Names and shapes are checked now; parameters are read at `read()`.
    heads: needed for a width that no published encoder has, if no config.json says it.
    position, dtype: of the `vit.network` for the parameters.
    Raises WeightsError for what is no weight file and ConfigError, with the array's name, for what does not fit.
    """
    path = hub.local(file)
    with weights_folder.opened(path) as weights:
        shapes = _below(kind, weights).shapes
    layout = recognise(kind, shapes)
    arch = architecture(kind, layout, shapes, heads or weights_folder.config(path).get("num_attention_heads"))
    names = LAYOUTS[layout]
    unread = () if arch.final_norm else (f"{names.norm}.",)
    target = jax.eval_shape(vit.network(arch, position, dtype).init, jax.random.key(0))
    mapping.check(kind.name, entries(layout, arch), shapes, target, (*kind.ignored, *unread))

    def read() -> Params:
        with weights_folder.opened(path) as weights:
            return mapping.fill(kind.name, entries(layout, arch), _below(kind, weights), target)

    return Release(arch, read)


def _below(kind: Kind, weights: NamedArrays) -> Arrays:
    bare = Arrays(weights)
    return Arrays(bare, kind.entry if bare.names(kind.entry) else "", kind.rename)


def export(params: Params, layout: str, arch: Architecture) -> dict[str, np.ndarray]:
    """An encoder's parameters under the names of a layout, C-contiguous float32."""
    return mapping.written(entries(one_of("layout", layout, LAYOUTS), arch), params)
