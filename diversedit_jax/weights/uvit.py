"""The parameters of `models.uvit` under the names of U-ViT's code, and what their shapes show."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from diversedit_jax.api import Conditions, Params, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import uvit
from diversedit_jax.weights import mapping
from diversedit_jax.weights.dit_names import CONV, SAME, Entry, Turn, conv, heads_of, linear, norm
from diversedit_jax.weights.mapping import Shapes

TOKENS = 77  # of a text, in CLIP's layout


class Architecture(NamedTuple):
    """Everything that distinguishes one U-ViT from another. Shapes tell all of it but `heads`.

    depth: as in `uvit.make`. grid: patches along each axis: a learned position table holds no other.
    num_classes: 0 without labels, None with text. text: (tokens, width) of its features, None without.
    """

    depth: int
    width: int
    heads: int
    patch: int
    channels: int
    grid: tuple[int, int]
    num_classes: int | None = 0
    text: tuple[int, int] | None = None
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    conv: bool = True
    time_mlp: bool = False

    second_time, token_width, pooled = False, None, None  # what it has not, see `dit_names.Architecture`

    @property
    def out_channels(self) -> int:
        """Of the prediction."""
        return self.channels

    @property
    def tokens(self) -> int | None:
        """Of a text. None without text."""
        return self.text and self.text[0]

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of its examples."""
        rows, columns = self.grid
        return rows * self.patch, columns * self.patch

    @property
    def options(self) -> dict[str, Any]:
        """The options of `uvit.make`."""
        names = ("depth", "width", "heads", "patch", "mlp_ratio", "qkv_bias", "conv", "time_mlp")
        return {name: getattr(self, name) for name in names}


def entries(arch: Architecture) -> list[Entry]:
    """The names of U-ViT's code."""
    found = linear(("patch_embed",), "patch_embed.proj", kernel=conv(arch.patch))
    found.append(Entry(("positions",), None, "pos_embed", Turn(lambda x: x[0], lambda x: x[None])))
    if arch.num_classes:
        found.append(Entry(("label_embed", "embedding"), None, "label_emb.weight", SAME))
    if arch.text:
        found += linear(("text_embed",), "context_embed")
    if arch.time_mlp:
        found += linear(("time_embed", "fc1"), "time_embed.0") + linear(("time_embed", "fc2"), "time_embed.2")
    kernel, bias = heads_of(arch.width, arch.heads)
    for name, stack, layer in layers(arch):
        found += linear((stack, "qkv"), f"{name}.attn.qkv", layer, kernel, bias)[: 1 + arch.qkv_bias]
        found += linear((stack, "proj"), f"{name}.attn.proj", layer)
        for part in ("norm1", "norm2"):
            found += norm((stack, part), f"{name}.{part}", layer)
        for part in ("fc1", "fc2"):
            found += linear((stack, part), f"{name}.mlp.{part}", layer)
        if stack == "outs":
            found += linear(("merges", "linear"), f"{name}.skip_linear", layer)
    found += norm(("norm",), "norm") + linear(("final",), "decoder_pred")
    return found + (linear(("conv",), "final_layer", kernel=CONV) if arch.conv else [])


def layers(arch: Architecture) -> Iterator[tuple[str, str, int]]:
    """(name there, stack, index in the stack) of every block."""
    half = arch.depth // 2
    yield from ((f"in_blocks.{i}", "ins", i) for i in range(half))
    yield "mid_block", "mid", 0
    yield from ((f"out_blocks.{i}", "outs", i) for i in range(half))


def architecture(family: str, shapes: Shapes, heads: int | None = None) -> Architecture:
    """The architecture that the shapes show. heads: None: as the published size of this width has."""

    def axes(name: str, count: int) -> tuple[int, ...]:
        return mapping.axes(family, shapes, name, count)

    width, channels, patch, _ = axes("patch_embed.proj.weight", 4)
    heads = heads or {size.width: size.heads for size in uvit.SIZES.values()}.get(width)
    if heads is None:
        raise ConfigError(f"the number of heads cannot be read from arrays of width {width}: give it with --heads=N")
    if heads < 1 or width % heads:
        raise ConfigError(f"{family}: heads = {heads} does not divide the width {width}")
    classes = axes("label_emb.weight", 2)[0] - 1 if "label_emb.weight" in shapes else 0
    text = axes("context_embed.weight", 2)[1] if "context_embed.weight" in shapes else None
    tokens, side = split(axes("pos_embed", 3)[1] - 1 - bool(classes), text is not None)
    return Architecture(
        depth=2 * len({name.split(".")[1] for name in shapes if name.startswith("in_blocks.")}),
        width=width,
        heads=heads,
        patch=patch,
        channels=channels,
        grid=(side, side),
        num_classes=classes if text is None else None,
        text=None if text is None else (tokens, text),
        mlp_ratio=axes("mid_block.mlp.fc1.weight", 2)[0] / width,
        qkv_bias="mid_block.attn.qkv.bias" in shapes,
        conv="final_layer.weight" in shapes,
        time_mlp="time_embed.0.weight" in shapes,
    )


def split(rows: int, text: bool) -> tuple[int, int]:
    """(tokens of text, patches along a side) of so many rows of a position table, of square images.

    The shapes do not tell one from the other. A text has CLIP's number of tokens, or else what the largest square
    leaves; `sized` finds the number by the side of the images.
    """
    counts = (TOKENS, rows - int(max(rows, 0) ** 0.5) ** 2) if text else (0,)
    for tokens in counts:
        side = round(max(rows - tokens, 0) ** 0.5)
        if side and side**2 == rows - tokens:
            return tokens, side
    raise ConfigError(f"uvit: its position table has {rows} rows for patches: only square images are read")


def sized(arch: Architecture, sides: tuple[int, int]) -> Architecture:
    """The architecture of a release for images of these sides: all other rows of its table are the text's.

    ConfigError if they do not fit its position table.
    """
    grid = tuple(side // arch.patch for side in sides)
    tokens = math.prod(arch.grid) - math.prod(grid) + (arch.text[0] if arch.text else 0)
    same = arch._replace(grid=grid, text=arch.text and (tokens, arch.text[1]))
    if same.sides != sides or (tokens < 1 if arch.text else tokens != 0):
        own, given = (" x ".join(map(str, pair)) for pair in (arch.sides, sides))
        raise ConfigError(f"uvit: its learned position table is for images of {own}, not of {given}")
    return same


def abstract(arch: Architecture) -> Params:
    """The shapes of our parameters for an architecture."""
    if arch.text is None:
        conditions = Conditions.labels(arch.num_classes)
    else:
        conditions = Conditions({"context": np.zeros(arch.text, np.float32)})
    model = uvit.make(Space((*arch.sides, arch.channels), conditions), {}, **arch.options)
    return jax.eval_shape(model.init, jax.random.key(0))
