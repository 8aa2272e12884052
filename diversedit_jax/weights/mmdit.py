"""The parameters of `models.mmdit` under the names of REPA's code, and what their shapes show."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from diversedit_jax.api import Conditions, Params, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import mmdit
from diversedit_jax.weights import mapping
from diversedit_jax.weights.dit_names import Entry, Place, Turn, conv, heads_of, linear, norm
from diversedit_jax.weights.mapping import Shapes

BLOCKS = "joint_blocks."
HEAD = 32  # width of a head of REPA's MMDiT, which has as many heads as blocks


class Architecture(NamedTuple):
    """Everything that distinguishes one MMDiT from another. Shapes tell all of it but `heads` and `table`.

    text: width of the text features. pooled: of the pooled text, None without it. table: side of the position table.
    """

    depth: int
    width: int
    heads: int
    patch: int
    channels: int
    text: int
    pooled: int | None = None
    mlp_ratio: float = 4.0
    qk_norm: str = "none"
    registers: int = 0
    table: int = mmdit.TABLE

    second_time, token_width, num_classes = False, None, None  # what it has not, see `dit_names.Architecture`
    tokens = None  # of a text: any number

    @property
    def out_channels(self) -> int:
        """Of the prediction."""
        return self.channels

    @property
    def options(self) -> dict[str, Any]:
        """The options of `mmdit.make`."""
        names = ("depth", "width", "heads", "patch", "mlp_ratio", "qk_norm", "registers", "table")
        return {name: getattr(self, name) for name in names}


def entries(arch: Architecture) -> list[Entry]:
    """The names of REPA's code, after those of Stable Diffusion 3's."""
    found = linear(("patch_embed",), "x_embedder.proj", kernel=conv(arch.patch))
    found += linear(("text_embed",), "context_embedder")
    embeddings = [("time_embed", "t_embedder"), ("pooled_embed", "y_embedder")]
    for ours, theirs in embeddings[: 1 + (arch.pooled is not None)]:
        found += linear((ours, "fc1"), f"{theirs}.mlp.0") + linear((ours, "fc2"), f"{theirs}.mlp.2")
    if arch.registers:
        found.append(Entry(("registers",), None, "register", Turn(lambda x: x[0], lambda x: x[None])))
    for i, stack, layer in layers(arch):
        for ours, theirs in (("image", "x_block"), ("text", "context_block")):
            found += stream(
                arch, (*stack, ours), f"{BLOCKS}{i}.{theirs}", layer, ends=stack == ("last",) and ours == "text"
            )
    return found + linear(("final_ada",), "final_layer.adaLN_modulation.1") + linear(("final",), "final_layer.linear")


def layers(arch: Architecture) -> Iterator[tuple[int, Place, int | None]]:
    """(block, its place or that of its stack, its index in the stack) of every block."""
    half = arch.depth // 2
    for i in range(arch.depth - 1):
        yield (i, ("shallow",), i) if i < half else (i, ("deep",), i - half)
    yield arch.depth - 1, ("last",), None


def stream(arch: Architecture, place: Place, name: str, layer: int | None, ends: bool) -> list[Entry]:
    """One stream of a block. ends: it is the text of the last block."""
    found = linear((*place, "ada"), f"{name}.adaLN_modulation.1", layer)
    found += linear((*place, "qkv"), f"{name}.attn.qkv", layer, *heads_of(arch.width, arch.heads))
    for ours, theirs in (("q_norm", "ln_q"), ("k_norm", "ln_k")):
        if arch.qk_norm != "none":  # the norm `rms` has no bias
            found += norm((*place, ours), f"{name}.attn.{theirs}", layer)[: 1 + (arch.qk_norm == "layer")]
    rest = () if ends else (("proj", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"))
    for ours, theirs in rest:
        found += linear((*place, ours), f"{name}.{theirs}", layer)
    return found


def architecture(family: str, shapes: Shapes, heads: int | None = None) -> Architecture:
    """The architecture that the shapes show. heads: None: as wide as in REPA's code, or as the q norm says."""

    def axes(name: str, count: int) -> tuple[int, ...]:
        return mapping.axes(family, shapes, name, count)

    width, channels, patch, _ = axes("x_embedder.proj.weight", 4)
    q_norm = f"{BLOCKS}0.x_block.attn.ln_q"
    heads = heads or width // (shapes[f"{q_norm}.weight"][0] if f"{q_norm}.weight" in shapes else HEAD)
    if not heads or width % heads:
        raise ConfigError(f"{family}: heads = {heads} does not divide the width {width}: give it with --heads=N")
    table = round(axes("pos_embed", 3)[1] ** 0.5) if "pos_embed" in shapes else mmdit.TABLE
    return Architecture(
        depth=len({name.split(".")[1] for name in shapes if name.startswith(BLOCKS)}),
        width=width,
        heads=heads,
        patch=patch,
        channels=channels,
        text=axes("context_embedder.weight", 2)[1],
        pooled=axes("y_embedder.mlp.0.weight", 2)[1] if "y_embedder.mlp.0.weight" in shapes else None,
        mlp_ratio=axes(f"{BLOCKS}0.x_block.mlp.fc1.weight", 2)[0] / width,
        qk_norm="none" if f"{q_norm}.weight" not in shapes else "layer" if f"{q_norm}.bias" in shapes else "rms",
        registers=axes("register", 3)[1] if "register" in shapes else 0,
        table=table,
    )


def abstract(arch: Architecture) -> Params:
    """The shapes of our parameters for an architecture."""
    condition = {"context": np.zeros((1, arch.text))} | (
        {} if arch.pooled is None else {"pooled": np.zeros(arch.pooled)}
    )
    space = Space((arch.patch, arch.patch, arch.channels), Conditions(condition))
    return jax.eval_shape(mmdit.make(space, {}, **arch.options).init, jax.random.key(0))
