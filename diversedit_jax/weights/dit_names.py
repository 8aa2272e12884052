"""The parameters of `models.dit` under the names, and in the layouts, of public releases.

Every array of a release is one `Entry`: where it goes in our tree and how it is turned, with the way back. Blocks are
stacked here, the first half of them in `shallow`, the others in `deep`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Turn(NamedTuple):
    """A change of layout and its inverse: transposes and reshapes only, so that a round trip is exact."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """One array of a release.

    place: the path in our tree, numbers in lists. layer: its index in a stack, or None. name: in the release.
    turn: between the layouts.
    part: where the release splits what is one array here (q, k and v), the index of this one, else None.
    """

    place: tuple[str | int, ...]
    layer: int | None
    name: str
    turn: Turn
    part: int | None = None


class Architecture(NamedTuple):
    """What the shapes of a release tell, and `heads`, which they do not."""

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


def heads_of(width: int, heads: int, transpose: bool) -> tuple[Turn, Turn]:
    """The kernel and bias of q, k and v together: [3 d, d] or [d, 3 d], and [3 d]; ours [d, 3, h, k] and [3, h, k]."""
    split = (3, heads, width // heads)
    kernel = Turn(
        lambda x: (x.T if transpose else x).reshape(width, *split),
        lambda x: x.reshape(width, -1).T if transpose else x.reshape(width, -1),
    )
    return kernel, Turn(lambda x: x.reshape(split), lambda x: x.reshape(-1))


def head_of(width: int, heads: int) -> tuple[Turn, Turn]:
    """The kernel and bias of one of q, k and v in torch: [d, d] and [d]; ours [d, h, k] and [h, k]."""
    split = (heads, width // heads)
    kernel = Turn(lambda x: x.T.reshape(width, *split), lambda x: x.reshape(width, -1).T)
    return kernel, Turn(lambda x: x.reshape(split), lambda x: x.reshape(-1))


def layers(arch: Architecture) -> Iterator[tuple[int, str, int]]:
    """(block, stack, index in the stack)."""
    half = arch.depth // 2
    for i in range(arch.depth):
        yield (i, "shallow", i) if i < half else (i, "deep", i - half)


def linear(place: tuple[str | int, ...], name: str, layer: int | None = None) -> list[Entry]:
    """A Linear of torch."""
    return [
        Entry((*place, "kernel"), layer, f"{name}.weight", LINEAR),
        Entry((*place, "bias"), layer, f"{name}.bias", SAME),
    ]


def norm(place: tuple[str | int, ...], name: str, layer: int | None = None) -> list[Entry]:
    """A LayerNorm of torch."""
    return [
        Entry((*place, "scale"), layer, f"{name}.weight", SAME),
        Entry((*place, "bias"), layer, f"{name}.bias", SAME),
    ]


def torch_names(arch: Architecture) -> list[Entry]:
    """The names of DiT, SiT, REPA, REG, SRA, DiverseDiT and MeanFlow's port to torch (`r_embedder` is given t - r)."""
    kernel, bias = heads_of(arch.width, arch.heads, transpose=True)
    entries = [
        Entry(("patch_embed", "kernel"), None, "x_embedder.proj.weight", conv(arch.patch)),
        Entry(("patch_embed", "bias"), None, "x_embedder.proj.bias", SAME),
        Entry(("label_embed", "embedding"), None, "y_embedder.embedding_table.weight", SAME),
    ]

    entries += linear(("time_embed", "fc1"), "t_embedder.mlp.0") + linear(("time_embed", "fc2"), "t_embedder.mlp.2")
    if arch.second_time:
        entries += linear(("span_embed", "fc1"), "r_embedder.mlp.0") + linear(("span_embed", "fc2"), "r_embedder.mlp.2")
    if arch.token_width is not None:
        entries += linear(("token_embed",), "cls_projectors2") + norm(("token_norm",), "wg_norm")
        entries += linear(("token_final",), "final_layer.linear_cls")
    for i, stack, layer in layers(arch):
        block = f"blocks.{i}"
        entries += [
            Entry((stack, "qkv", "kernel"), layer, f"{block}.attn.qkv.weight", kernel),
            Entry((stack, "qkv", "bias"), layer, f"{block}.attn.qkv.bias", bias),
        ]
        for ours, theirs in [
            ("ada", "adaLN_modulation.1"),
            ("proj", "attn.proj"),
            ("fc1", "mlp.fc1"),
            ("fc2", "mlp.fc2"),
        ]:
            entries += linear((stack, ours), f"{block}.{theirs}", layer)
        if arch.qk_norm:
            entries += norm((stack, "q_norm"), f"{block}.attn.q_norm", layer)
            entries += norm((stack, "k_norm"), f"{block}.attn.k_norm", layer)
    if arch.skip:
        for k in range(arch.depth // 2):
            entries += norm(("merges", "norm"), f"skip_norms.{k}", k)
            entries += linear(("merges", "linear"), f"skip_linears.{k}.linear", k)
    return entries + linear(("final_ada",), "final_layer.adaLN_modulation.1") + linear(("final",), "final_layer.linear")


def meanflow_names(arch: Architecture) -> list[Entry]:
    """The paths of the official MeanFlow in JAX, joined by `/`: kernels are [in, out] as here, patches [p, p, c, d]."""
    kernel, bias = heads_of(arch.width, arch.heads, transpose=False)
    entries = [
        Entry(("patch_embed", "kernel"), None, "net/x_embedder/proj/kernel", conv_last(arch.patch)),
        Entry(("patch_embed", "bias"), None, "net/x_embedder/proj/bias", SAME),
        Entry(("label_embed", "embedding"), None, "net/y_embedder/embedding_table/_flax_embedding/embedding", SAME),
    ]

    def flax_linear(place: tuple[str, ...], name: str, layer: int | None = None) -> list[Entry]:
        path = f"net/{name}/_flax_linear"
        return [Entry((*place, leaf), layer, f"{path}/{leaf}", SAME) for leaf in ("kernel", "bias")]

    for ours, theirs in [("time_embed", "t_embedder"), ("span_embed", "h_embedder")]:
        entries += flax_linear((ours, "fc1"), f"{theirs}/mlp/layers_0") + flax_linear(
            (ours, "fc2"), f"{theirs}/mlp/layers_2"
        )
    for i, stack, layer in layers(arch):
        block = f"net/blocks/layers_{i}"
        entries += [
            Entry((stack, "qkv", "kernel"), layer, f"{block}/attn/qkv/_flax_linear/kernel", kernel),
            Entry((stack, "qkv", "bias"), layer, f"{block}/attn/qkv/_flax_linear/bias", bias),
        ]
        for ours, theirs in [("proj", "attn/proj"), ("fc1", "mlp/fc1"), ("fc2", "mlp/fc2")]:
            entries += flax_linear((stack, ours), f"blocks/layers_{i}/{theirs}", layer)
        entries += flax_linear((stack, "ada"), f"blocks/layers_{i}/adaLN_modulation/layers_1", layer)
    entries += flax_linear(("final_ada",), "final_layer/adaLN_modulation/layers_1")
    return entries + flax_linear(("final",), "final_layer/linear")


def diffusers_names(arch: Architecture) -> list[Entry]:
    """The names of diffusers' DiTTransformer2DModel: q, k and v apart, time and label embedded in every block."""
    kernel, bias = head_of(arch.width, arch.heads)
    entries = [
        Entry(("patch_embed", "kernel"), None, "pos_embed.proj.weight", conv(arch.patch)),
        Entry(("patch_embed", "bias"), None, "pos_embed.proj.bias", SAME),
    ]

    for i, stack, layer in layers(arch):
        block = f"transformer_blocks.{i}"
        table = f"{block}.norm1.emb.class_embedder.embedding_table.weight"
        entries.append(Entry(("label_embed", "embedding"), None, table, SAME))
        for ours, theirs in [("fc1", "linear_1"), ("fc2", "linear_2")]:
            entries += linear(("time_embed", ours), f"{block}.norm1.emb.timestep_embedder.{theirs}")
        for part, name in enumerate("qkv"):
            entries += [
                Entry((stack, "qkv", "kernel"), layer, f"{block}.attn1.to_{name}.weight", kernel, part),
                Entry((stack, "qkv", "bias"), layer, f"{block}.attn1.to_{name}.bias", bias, part),
            ]
        entries += linear((stack, "ada"), f"{block}.norm1.linear", layer)
        entries += linear((stack, "proj"), f"{block}.attn1.to_out.0", layer)
        entries += linear((stack, "fc1"), f"{block}.ff.net.0.proj", layer)
        entries += linear((stack, "fc2"), f"{block}.ff.net.2", layer)
    return entries + linear(("final_ada",), "proj_out_1") + linear(("final",), "proj_out_2")
