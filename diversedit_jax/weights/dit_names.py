"""The parameters of `models.dit` under the names, and in the layouts, of public releases.

Every array of a release is one `Entry`: its name there, its place in our tree, and the change of layout between them.
Our blocks are stacked: the first half of them in `shallow`, the others in `deep`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

Place = tuple[str | int, ...]


class Turn(NamedTuple):
    """A change of layout and its inverse: transposes and reshapes only, so that a round trip is exact."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """One array of a release.

    place: its path in our tree; a number is an index into a list.
    layer: its index in a stack of layers, else None.
    name:  its name in the release.
    turn:  the change of layout.
    part:  its index where the release splits one of our arrays (q, k and v), else None.
    """

    place: Place
    layer: int | None
    name: str
    turn: Turn
    part: int | None = None


class Architecture(NamedTuple):
    """Everything that distinguishes one network from another. Shapes tell all of it but `heads`."""

    depth: int
    width: int
    heads: int
    patch: int
    channels: int
    out_channels: int
    num_classes: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    skip: bool = False
    second_time: bool = False
    token_width: int | None = None


SAME = Turn(lambda x: x, lambda x: x)
LINEAR = Turn(lambda x: x.T, lambda x: x.T)  # torch keeps [out, in]
CONV = Turn(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # torch keeps [out, in, h, w]


def conv(patch: int) -> Turn:
    """torch's [d, c, p, p] and our [p * p * c, d]."""
    return Turn(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(patch, patch, -1, x.shape[-1]).transpose(3, 2, 0, 1),
    )


def conv_last(patch: int) -> Turn:
    """Flax's [p, p, c, d] and our [p * p * c, d]."""
    return Turn(lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(patch, patch, -1, x.shape[-1]))


def heads_of(width: int, heads: int, parts: tuple[int, ...] = (3,), torch: bool = True) -> tuple[Turn, Turn]:
    """The kernel and the bias of q, k and v in one array, as every release but diffusers' has them.

    Theirs: [3 d, d] and [3 d]; kernels that are not torch's: [d, 3 d]. Ours: [d, 3, h, k] and [3, h, k].
    parts: () for one of q, k and v alone, without the axis of 3.
    """
    split = (*parts, heads, width // heads)
    kernel = Turn(
        lambda x: (x.T if torch else x).reshape(width, *split),
        lambda x: x.reshape(width, -1).T if torch else x.reshape(width, -1),
    )
    return kernel, Turn(lambda x: x.reshape(split), lambda x: x.reshape(-1))


def layers(arch: Architecture) -> Iterator[tuple[int, str, int]]:
    """(block, stack, index in the stack) of every block."""
    half = arch.depth // 2
    for i in range(arch.depth):
        yield (i, "shallow", i) if i < half else (i, "deep", i - half)


def linear(
    place: Place,
    name: str,
    layer: int | None = None,
    kernel: Turn = LINEAR,
    bias: Turn = SAME,
    part: int | None = None,
) -> list[Entry]:
    """The weight and bias of a layer of torch: by default a Linear."""
    weight = Entry((*place, "kernel"), layer, f"{name}.weight", kernel, part)
    return [weight, Entry((*place, "bias"), layer, f"{name}.bias", bias, part)]


def norm(place: Place, name: str, layer: int | None = None) -> list[Entry]:
    """A LayerNorm of torch."""
    leaves = {"scale": "weight", "bias": "bias"}
    return [Entry((*place, ours), layer, f"{name}.{theirs}", SAME) for ours, theirs in leaves.items()]


def torch_names(arch: Architecture) -> list[Entry]:
    """The names of DiT, SiT, REPA, REG, SRA, DiverseDiT and MeanFlow's port to torch (`r_embedder` is given t - r)."""
    kernel, bias = heads_of(arch.width, arch.heads)
    entries = linear(("patch_embed",), "x_embedder.proj", kernel=conv(arch.patch))
    entries += [Entry(("label_embed", "embedding"), None, "y_embedder.embedding_table.weight", SAME)]
    for ours, theirs in [("time_embed", "t_embedder"), ("span_embed", "r_embedder")][: 1 + arch.second_time]:
        entries += linear((ours, "fc1"), f"{theirs}.mlp.0") + linear((ours, "fc2"), f"{theirs}.mlp.2")
    if arch.token_width is not None:
        entries += linear(("token_embed",), "cls_projectors2") + norm(("token_norm",), "wg_norm")
        entries += linear(("token_final",), "final_layer.linear_cls")
    for i, stack, layer in layers(arch):
        block = f"blocks.{i}"
        entries += linear((stack, "qkv"), f"{block}.attn.qkv", layer, kernel, bias)
        entries += linear((stack, "ada"), f"{block}.adaLN_modulation.1", layer)
        entries += linear((stack, "proj"), f"{block}.attn.proj", layer)
        entries += linear((stack, "fc1"), f"{block}.mlp.fc1", layer)
        entries += linear((stack, "fc2"), f"{block}.mlp.fc2", layer)
        if arch.qk_norm:
            entries += norm((stack, "q_norm"), f"{block}.attn.q_norm", layer)
            entries += norm((stack, "k_norm"), f"{block}.attn.k_norm", layer)
    for k in range(arch.depth // 2 if arch.skip else 0):
        entries += norm(("merges", "norm"), f"skip_norms.{k}", k)
        entries += linear(("merges", "linear"), f"skip_linears.{k}.linear", k)
    return entries + linear(("final_ada",), "final_layer.adaLN_modulation.1") + linear(("final",), "final_layer.linear")


def meanflow_names(arch: Architecture) -> list[Entry]:
    """The paths of the official MeanFlow in JAX, joined by `/`: kernels are [in, out] as here, patches [p, p, c, d]."""

    def layer_of(
        place: Place, name: str, layer: int | None = None, kernel: Turn = SAME, bias: Turn = SAME
    ) -> list[Entry]:
        turns = {"kernel": kernel, "bias": bias}
        return [Entry((*place, leaf), layer, f"net/{name}/{leaf}", turn) for leaf, turn in turns.items()]

    kernel, bias = heads_of(arch.width, arch.heads, torch=False)
    entries = layer_of(("patch_embed",), "x_embedder/proj", kernel=conv_last(arch.patch))
    table = "net/y_embedder/embedding_table/_flax_embedding/embedding"
    entries += [Entry(("label_embed", "embedding"), None, table, SAME)]
    for ours, theirs in [("time_embed", "t_embedder"), ("span_embed", "h_embedder")]:
        entries += layer_of((ours, "fc1"), f"{theirs}/mlp/layers_0/_flax_linear")
        entries += layer_of((ours, "fc2"), f"{theirs}/mlp/layers_2/_flax_linear")
    for i, stack, layer in layers(arch):
        block = f"blocks/layers_{i}"
        entries += layer_of((stack, "qkv"), f"{block}/attn/qkv/_flax_linear", layer, kernel, bias)
        entries += layer_of((stack, "proj"), f"{block}/attn/proj/_flax_linear", layer)
        entries += layer_of((stack, "fc1"), f"{block}/mlp/fc1/_flax_linear", layer)
        entries += layer_of((stack, "fc2"), f"{block}/mlp/fc2/_flax_linear", layer)
        entries += layer_of((stack, "ada"), f"{block}/adaLN_modulation/layers_1/_flax_linear", layer)
    entries += layer_of(("final_ada",), "final_layer/adaLN_modulation/layers_1/_flax_linear")
    return entries + layer_of(("final",), "final_layer/linear/_flax_linear")


def diffusers_names(arch: Architecture) -> list[Entry]:
    """The names of diffusers' DiTTransformer2DModel: q, k and v apart, time and label embedded in every block."""
    kernel, bias = heads_of(arch.width, arch.heads, parts=())
    entries = linear(("patch_embed",), "pos_embed.proj", kernel=conv(arch.patch))
    for i, stack, layer in layers(arch):
        block = f"transformer_blocks.{i}"
        table = f"{block}.norm1.emb.class_embedder.embedding_table.weight"
        entries += [Entry(("label_embed", "embedding"), None, table, SAME)]
        entries += linear(("time_embed", "fc1"), f"{block}.norm1.emb.timestep_embedder.linear_1")
        entries += linear(("time_embed", "fc2"), f"{block}.norm1.emb.timestep_embedder.linear_2")
        for part, name in enumerate("qkv"):
            entries += linear((stack, "qkv"), f"{block}.attn1.to_{name}", layer, kernel, bias, part)
        entries += linear((stack, "ada"), f"{block}.norm1.linear", layer)
        entries += linear((stack, "proj"), f"{block}.attn1.to_out.0", layer)
        entries += linear((stack, "fc1"), f"{block}.ff.net.0.proj", layer)
        entries += linear((stack, "fc2"), f"{block}.ff.net.2", layer)
    return entries + linear(("final_ada",), "proj_out_1") + linear(("final",), "proj_out_2")
