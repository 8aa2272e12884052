"""The diffusion transformer of DiT and SiT (arXiv 2212.09748, 2401.08740), with the long residual connections of
DiverseDiT (arXiv 2603.04239, Eq. 8).

The first half of the blocks is one stack, `shallow`, the second half another, `deep` (see `stack`). Each deep block is
merged with the output of its shallow partner: the last with the first. Tokens are patches of an image, a video or a
volume.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from diversedit_jax import sharding
from diversedit_jax.api import Model, Params, Skips, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Keys, check_inputs, functional
from diversedit_jax.models.attention import ATTENDED, attend, choose, kept
from diversedit_jax.models.stack import Stack, each, part, stacked
from diversedit_jax.registry import MANY, in_range, one_of

EPS = 1e-6  # of every LayerNorm
FLOATS = ("float32", "bfloat16", "float16")

# How parameters are split over devices, see `sharding.RULES`: heads and hidden units over `tensor`, the rest over
# `fsdp`. The leading layer axis is never split.
RULES = (
    (r"\b(shallow|deep)/qkv/kernel$", "- * - tensor -"),
    (r"\b(shallow|deep)/qkv/bias$", "- - tensor -"),
    (r"\b(shallow|deep)/fc1/kernel$", "- * tensor"),
    (r"\b(shallow|deep)/fc1/bias$", "- tensor"),
    (r"\b(shallow|deep)/(proj|fc2)/kernel$", "- tensor *"),
    (r"\b(shallow|deep|merges)/", "- * ..."),
)


class Size(NamedTuple):
    depth: int
    width: int
    heads: int


SIZES = {"S": Size(12, 384, 6), "B": Size(12, 768, 12), "L": Size(24, 1024, 16), "XL": Size(28, 1152, 16)}


class Skip(NamedTuple):
    """A form of long residual connections between block i and block L - 1 - i, counted from 0.

    merge: `post`: the deep block's output is merged with the skip; `pre`: its input is.
    norm:  LayerNorm over the concatenated 2 d channels before the Linear.
    init:  of the Linear's kernel, a name of KERNELS. None: no Linear, but a `Gate`.
    """

    merge: str
    norm: bool
    init: str | None


SKIPS = {
    "none": None,
    "release": Skip("post", norm=True, init="xavier"),  # DiverseDiT as its authors' code has it
    "paper": Skip("pre", norm=True, init="xavier"),  # DiverseDiT as Eq. 8 has it
    "skip_dit": Skip("pre", norm=True, init="torch"),  # arXiv 2411.17616
    "uvit": Skip("pre", norm=False, init="trunc_normal"),  # arXiv 2209.12152
    "gate": Skip("post", norm=False, init=None),  # ours: no published network has it
}


KERNELS = {
    "xavier": nnx.initializers.xavier_uniform(),
    "torch": nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # torch's default for Linear
    "trunc_normal": nnx.initializers.normal(0.02),  # U-ViT cuts it at +- 2, which is 100 standard deviations
    "identity": lambda key, shape, dtype=jnp.float32: jnp.eye(*shape, dtype=dtype),  # x stays, the skip counts zero
}

POSITIONS = ("auto", "axes", "frames", "learned_frames", "space")
FRESH = ("merges", "frame_positions")  # parts that a release to start from may lack

# What the backward pass keeps of a block besides its input. Everything else is computed again.
NAMES = ("ada", "qkv", ATTENDED, "proj", "fc1", "fc2", "moments")
POLICIES = jax.checkpoint_policies
REMAT = {
    # the output of every matmul, and of every attention kernel
    "named": POLICIES.save_from_both_policies(POLICIES.save_only_these_names(*NAMES), kept),
    "dots": POLICIES.dots_with_no_batch_dims_saveable,
    "full": POLICIES.nothing_saveable,
    "none": None,  # everything is kept
}


def layer_norm(x: Float[Array, "*b d"], eps: float = EPS) -> Float[Array, "*b d"]:
    """LayerNorm without parameters, in float32."""
    x = x.astype(jnp.float32)
    x = x - checkpoint_name(x.mean(axis=-1, keepdims=True), "moments")
    return x * jax.lax.rsqrt(checkpoint_name(jnp.mean(x * x, axis=-1, keepdims=True), "moments") + eps)


def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b n d"]:
    """adaLN: the normalised features, scaled and shifted by the condition, in float32."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def linear_of(init: str, dtype, rngs: Keys, kernel: Callable = KERNELS["xavier"], precision: str | None = None):
    """What builds a linear layer: (inputs, outputs, zero=False) -> layer.

    init: `adaln_zero`: kernels by `kernel`, or zero where a network begins as the identity (`zero`), and biases zero;
        `torch`: torch's default for every kernel and bias.
    """

    def linear(inputs: int, outputs: int | tuple[int, ...], zero: bool = False) -> nnx.Linear | nnx.LinearGeneral:
        chosen = {"kernel_init": nnx.initializers.zeros if zero else kernel}
        if init == "torch":
            chosen = {"kernel_init": KERNELS["torch"], "bias_init": partial(symmetric, bound=inputs**-0.5)}
        layer = nnx.Linear if isinstance(outputs, int) else nnx.LinearGeneral
        return layer(inputs, outputs, dtype=dtype, precision=precision, rngs=rngs, **chosen)

    return linear


def symmetric(key: Array, shape: tuple[int, ...], dtype=jnp.float32, *, bound: float) -> Array:
    """Uniform numbers between -bound and bound."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)


QK_NORMS = {"none": None, "layer": nnx.LayerNorm, "rms": nnx.RMSNorm}  # of queries and keys, over the width of a head


def qk_norm_of(name: str, head: int, rngs: Keys) -> nnx.LayerNorm | nnx.RMSNorm | None:
    """A norm of QK_NORMS for heads of this width."""
    build = QK_NORMS[name]
    return build and build(head, epsilon=EPS, dtype=jnp.float32, rngs=rngs)


class Axes(NamedTuple):
    """Which tokens of a video attend to each other: those of a frame, or (`across`) those at a place in all frames."""

    frames: int
    across: bool
    kernel: str

    def __call__(
        self, q: Float[Array, "b n h k"], k: Float[Array, "b n h k"], v: Float[Array, "b n h k"]
    ) -> Float[Array, "b n h k"]:
        """Attention, with the tokens of all frames one after another."""
        b, n, *head = q.shape
        video = (b, self.frames, n // self.frames, *head)

        def grouped(x: Array) -> Array:
            x = x.reshape(video)
            x = x.swapaxes(1, 2) if self.across else x
            return x.reshape(-1, *x.shape[2:])

        out = attend(*map(grouped, (q, k, v)), self.kernel)
        if self.across:
            return out.reshape(b, video[2], video[1], *head).swapaxes(1, 2).reshape(q.shape)
        return out.reshape(q.shape)


class Block(nnx.Module):
    """A transformer block with adaLN-Zero (DiT, section 3.2)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: str,
        dtype,
        attention: str = "xla",
        init: str = "adaln_zero",
        *,
        rngs: Keys,
    ):
        hidden, linear = int(width * mlp_ratio), linear_of(init, dtype, rngs)
        self.ada = linear(width, 6 * width, zero=True)
        self.qkv = linear(width, (3, heads, width // heads))
        self.q_norm, self.k_norm = (qk_norm_of(qk_norm, width // heads, rngs) for _ in range(2))
        self.proj = linear(width, width)
        self.fc1 = linear(width, hidden)
        self.fc2 = linear(hidden, width)
        self.dtype, self.attention = dtype, attention

    def __call__(
        self, x: Float[Array, "b n d"], c: Float[Array, "b d"], axes: Axes | None = None
    ) -> Float[Array, "b n d"]:
        """axes: which tokens attend to each other; None: all."""
        ada = self.modulation(c)
        attended = partial(attend, kernel=self.attention) if axes is None else axes
        return self.after(x, attended(*self.heads(x, ada)), ada)

    def modulation(self, c: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        """Shift, scale and gate of the attention, then those of the MLP."""
        return jnp.split(checkpoint_name(self.ada(jax.nn.silu(c)), "ada").astype(jnp.float32), 6, axis=-1)

    def heads(self, x: Float[Array, "b n d"], ada: list[Array]) -> tuple[Array, Array, Array]:
        """Queries, keys and values, [b n h k] each."""
        qkv = checkpoint_name(self.qkv(modulate(x, *ada[:2]).astype(self.dtype)), "qkv")
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        if self.q_norm is not None:
            q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        return q, k, v

    def after(self, x: Float[Array, "b n d"], out: Float[Array, "b n h k"], ada: list[Array]) -> Float[Array, "b n d"]:
        """x, with the attention's output and then that of the MLP added to it."""
        _, _, gate_a, shift_m, scale_m, gate_m = ada
        x = x + (gate_a[:, None] * checkpoint_name(self.proj(out.reshape(x.shape)), "proj")).astype(x.dtype)
        x = x + (gate_m[:, None] * self._mlp(modulate(x, shift_m, scale_m))).astype(x.dtype)
        return sharding.kept_over_batch(x)

    def _mlp(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        hidden = checkpoint_name(self.fc1(x.astype(self.dtype)), "fc1")
        return checkpoint_name(self.fc2(jax.nn.gelu(hidden, approximate=True)), "fc2")


class Merge(nnx.Module):
    """A long residual connection (Eq. 8): x <- Linear(LayerNorm(concatenate[x, skip])), from 2 d channels to d.

    With init `identity` it changes nothing at first, so that a trained network can be given connections. No kernel
    undoes a LayerNorm, so with one the Linear starts at zero and its output is added to x.
    """

    def __init__(self, width: int, norm: bool, init: str, dtype, *, rngs: Keys):
        self.norm = nnx.LayerNorm(2 * width, epsilon=EPS, dtype=jnp.float32, rngs=rngs) if norm else None
        self.adds = norm and init == "identity"
        kernel = nnx.initializers.zeros if self.adds else KERNELS[init]
        self.linear = nnx.Linear(2 * width, width, dtype=dtype, kernel_init=kernel, rngs=rngs)
        if init == "torch":  # torch's biases are as random as its kernels
            bound = (2 * width) ** -0.5
            self.linear.bias = nnx.Param(jax.random.uniform(rngs.params(), (width,), minval=-bound, maxval=bound))

    def __call__(self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        both = jnp.concatenate([x, skip], axis=-1)
        both = both if self.norm is None else layer_norm(both) * self.norm.scale + self.norm.bias
        merged = self.linear(both).astype(x.dtype)
        return x + merged if self.adds else merged


class Gate(nnx.Module):
    """A long residual connection without a Linear: x <- x + gate * skip, a gate for each channel, zero at first."""

    def __init__(self, width: int, *, rngs: Keys):
        self.gate = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x + (self.gate * skip).astype(x.dtype)


def merging(form: Skip, width: int, dtype) -> Callable[..., Merge | Gate]:
    """What builds one connection of a form from `rngs`."""
    return partial(Gate, width) if form.init is None else partial(Merge, width, form.norm, form.init, dtype)


class Perceptron(nnx.Module):
    """Linear, SiLU, Linear, in float32. init: as for `linear_of`."""

    def __init__(self, inputs: int, width: int, init: str = "adaln_zero", *, rngs: Keys):
        linear = linear_of(init, None, rngs, nnx.initializers.normal(0.02), precision="highest")
        self.fc1, self.fc2 = linear(inputs, width), linear(width, width)

    def __call__(self, x: Float[Array, "b k"]) -> Float[Array, "b d"]:
        return self.fc2(jax.nn.silu(self.fc1(x)))


class TimeEmbedding(Perceptron):
    """The sinusoids of t, not multiplied by 1000, through a Perceptron."""

    def __init__(self, width: int, frequencies: int = 256, init: str = "adaln_zero", *, rngs: Keys):
        super().__init__(frequencies, width, init, rngs=rngs)
        self.frequencies = frequencies

    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b d"]:
        half = self.frequencies // 2
        angles = t.astype(jnp.float32)[:, None] * np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
        return super().__call__(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))


class DiT(nnx.Module):
    """(x_t, t, y, **inputs) -> (prediction, features); see `make` for the options.

    block, merge: build one Block, and one Merge or Gate, from `rngs`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        inputs: Mapping[str, tuple[int, ...]],
        depth: int,
        width: int,
        patch: tuple[int, ...],
        positions: str,
        out_channels: int,
        block: Callable[..., Block],
        merge: Callable[..., Merge | Gate] | None,
        skip: Skip | None,
        capture: str,
        axes: tuple[Axes, ...],
        pairing: str,
        stack: Stack,
        dtype,
        stream_dtype,
        *,
        rngs: Keys,
    ):
        half = depth // 2
        numbers = math.prod(patch)  # elements of a patch, for each channel
        linear = partial(nnx.Linear, dtype=dtype, kernel_init=KERNELS["xavier"], rngs=rngs)
        zeros = nnx.initializers.zeros
        self.patch_embed = linear(numbers * shape[-1], width)
        self.time_embed = TimeEmbedding(width, rngs=rngs)
        self.span_embed = TimeEmbedding(width, rngs=rngs) if "span" in inputs else None
        self.label_embed = nnx.Embed(num_classes + 1, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.shallow = stacked(lambda rngs: block(rngs=rngs), half, rngs)
        self.deep = stacked(lambda rngs: block(rngs=rngs), depth - half, rngs)
        self.merges = skip and stacked(lambda rngs: merge(rngs=rngs), half, rngs)
        self.final_ada = linear(width, 2 * width, kernel_init=zeros)
        self.final = linear(width, numbers * out_channels, kernel_init=zeros)
        if "token" in inputs:
            (token_width,) = inputs["token"]
            self.token_embed = linear(token_width, width)
            self.token_norm = nnx.LayerNorm(width, epsilon=EPS, dtype=jnp.float32, rngs=rngs)
            self.token_final = linear(width, token_width, kernel_init=zeros)
        if positions == "learned_frames":
            self.frame_positions = nnx.Param(jnp.zeros((shape[0] // patch[0], width)))
        self.shape, self.out_shape, self.patch, self.depth = shape, (*shape[:-1], out_channels), patch, depth
        self.inputs, self.skip, self.capture, self.stack = frozenset(inputs), skip, capture, stack
        self.positions, self.axes, self.pairing = positions, axes, pairing
        self.dtype, self.stream_dtype = dtype, stream_dtype

    def __call__(
        self,
        x_t: Float[Array, "b *s c"],
        t: Float[Array, " b"],
        y: Int[Array, " b"],
        *,
        span: Float[Array, " b"] | None = None,
        token: Float[Array, "b k"] | None = None,
    ) -> tuple[
        Float[Array, "b *s o"] | tuple[Float[Array, "b *s o"], Float[Array, "b k"]], tuple[Float[Array, "b n d"], ...]
    ]:
        self._check(x_t, span=span, token=token)
        h = self._embed(x_t, token)
        c = self.time_embed(t) + self.label_embed(y)
        c = c if span is None else c + self.span_embed(span)

        def plain(h: Array, layer: tuple[Block], axes: Axes | None = None):
            (block,) = layer
            h = block(h, c, axes)
            return h, h

        def merged(h: Array, layer: tuple[Block, Merge | Gate, Array], axes: Axes | None = None):
            """Deep block j with the output of its partner, block i = L - 1 - j, counted from 0. Eq. 8 of DiverseDiT:

            h_j <- Linear(LayerNorm(concatenate[h_j, h_i])), where h_j is what block j gives (`post`) or takes (`pre`).
            """
            block, merge, skip = layer
            if self.skip.merge == "pre":
                h = block(merge(h, skip), c, axes)
                return h, h
            before = block(h, c, axes)
            h = merge(before, skip)
            return h, before if self.capture == "block" else h

        def run(body: Callable, h: Array, layers: tuple, first: int, separate: bool = False):
            if not self.axes:
                return self.stack.run(body, h, layers, first, separate)
            modules, skips = layers[:2], layers[2:]
            return self.stack.run(partial(self._alternating, body), h, (*map(in_pairs, modules), *skips), first)

        half = self.depth // 2
        features = [h]
        h, outputs, shallow = run(plain, h, (self.shallow,), 0)
        if self.skip:
            skips, outputs = self.stack.reverse(shallow, outputs)
        features += outputs
        alone = self.depth % 2 if self.skip else self.depth - half  # deep blocks without a partner
        if alone:
            h, outputs, _ = run(plain, h, (part(self.deep, 0, alone),), half)
            features += outputs
        if self.skip:
            layers = (part(self.deep, alone), self.merges, skips)
            separate = self.skip.merge == "post" and self.capture == "block"
            h, outputs, _ = run(merged, h, layers, half + alone, separate)
            features += outputs
        return self._output(h, c), tuple(features)

    def _alternating(self, body: Callable, h: Array, layer: tuple) -> tuple[Array, tuple[Array, ...]]:
        """A block within frames and one across them. layer: (both blocks, both merges, the outputs of their partners).

        The partners come as they ran. With pairing `mirror` the first of them is the partner of the last block.
        """
        (blocks, *merges), skips = layer[:2], layer[2:]
        outputs = []
        for kind, axes in enumerate(self.axes):
            modules = (jax.tree.map(lambda leaf, kind=kind: leaf[kind], module) for module in (blocks, *merges))
            partner = kind if self.pairing == "same_kind" else ~kind
            h, output = body(h, (*modules, *(skip[partner] for skip in skips)), axes)
            outputs.append(output)
        return h, tuple(outputs)

    def _check(self, x_t: Array, **inputs: Array | None) -> None:
        """Raise ValueError for an example of another shape, and for an input that is missing or not taken."""
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"the network takes examples of shape {self.shape}, given {x_t.shape[1:]}")
        given = {name for name, value in inputs.items() if value is not None}
        if given != self.inputs:
            takes, found = (", ".join(sorted(names)) or "no further input" for names in (self.inputs, given))
            raise ValueError(f"the network takes {takes}, given {found}")

    def _embed(self, x_t: Float[Array, "b *s c"], token: Float[Array, "b k"] | None) -> Float[Array, "b n d"]:
        """The patches with their positions. A class token comes before them, without a position."""
        h = self.patch_embed(patchify(x_t, self.patch).astype(self.dtype)).astype(jnp.float32)
        h = h + position_table(places(self.shape, self.patch), h.shape[-1], self.positions)
        if self.positions == "learned_frames":
            h = h + jnp.repeat(self.frame_positions, h.shape[1] // len(self.frame_positions), axis=0)
        if token is not None:
            first = self.token_norm(self.token_embed(token.astype(self.dtype)))
            h = jnp.concatenate([first[:, None], h], axis=1)
        return sharding.kept_over_batch(h.astype(self.stream_dtype))

    def _output(self, h: Float[Array, "b n d"], c: Float[Array, "b d"]):
        """The prediction: adaLN, a Linear, patches put together. With a class token: (that of x, that of the token)."""
        shift, scale = jnp.split(self.final_ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        h = modulate(h, shift, scale).astype(self.dtype)
        token = "token" in self.inputs
        out = self.final(h[:, 1:] if token else h).astype(jnp.float32)
        image = unpatchify(out, self.out_shape, self.patch)
        return (image, self.token_final(h[:, 0]).astype(jnp.float32)) if token else image


def in_pairs(layers: Any) -> Any:
    """Stacked layers, two in each: the leading axis l becomes [l / 2, 2]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), layers)


def patchify(x: Float[Array, "b *s c"], patch: tuple[int, ...]) -> Float[Array, "b n p"]:
    """Patches with these sides in row-major order, each flattened as (place in the patch, channel)."""
    b, *sides, c = x.shape
    axes, grid = len(sides), places(x.shape[1:], patch)
    x = x.reshape(b, *(n for pair in zip(grid, patch, strict=True) for n in pair), c)
    x = x.transpose(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(b, math.prod(grid), math.prod(patch) * c)


def unpatchify(x: Float[Array, "b n p"], shape: tuple[int, ...], patch: tuple[int, ...]) -> Float[Array, "b *s c"]:
    """The inverse of `patchify`, for examples of `shape` (*s, c)."""
    *sides, c = shape
    axes = len(sides)
    x = x.reshape(-1, *places(shape, patch), *patch, c)
    x = x.transpose(0, *(i for axis in range(axes) for i in (1 + axis, 1 + axes + axis)), 2 * axes + 1)
    return x.reshape(-1, *shape)


def places(shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each spatial axis of examples of `shape` (*s, c)."""
    return tuple(side // of for side, of in zip(shape[:-1], patch, strict=True))


def position_table(grid: tuple[int, ...], width: int, positions: str = "axes") -> np.ndarray:
    """The fixed sin-cos table [n d] of DiT, for a grid of patches with any number of axes.

    positions: one of POSITIONS. `axes`: the channels are divided evenly among the axes, the last axis first: of an
        image, half encode the column, the others the row. The others, for videos: the table of one frame for all, and
        with `frames` one over frames of the full width is added to it, as in Latte (arXiv 2401.03048). It is taken
        relative to the first frame, so a video of one frame has the positions of an image.
    """
    if positions != "axes":
        frame = np.tile(position_table(grid[1:], width), (grid[0], 1))
        if positions != "frames":
            return frame
        time = position_table(grid[:1], width)
        return frame + np.repeat(time - time[0], math.prod(grid[1:]), axis=0)
    per_axis = width // (2 * len(grid))
    frequencies = 10000.0 ** -(np.arange(per_axis) / per_axis)
    places = np.meshgrid(*map(np.arange, grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in reversed(places)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def make(
    space: Space,
    inputs: Mapping[str, tuple[int, ...]],
    read_blocks: tuple[int, ...] = (),
    *,
    size: str = "B",
    patch: int = 2,
    patch_frames: int = 1,
    positions: str = "auto",
    attention_axes: str = "joint",
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    mlp_ratio: float = 4.0,
    qk_norm: bool = False,
    skip: str = "none",
    skip_init: str | None = None,
    pairing: str = "mirror",
    dtype: str = "float32",
    stream_dtype: str = "float32",
    remat: str = "named",
    capture: str = "merged",
    out_channels: int | None = None,
    attention: str = "auto",
    unroll: bool | None = None,
) -> Model:
    """A SiT or DiT for examples of `space`, whose conditions are labels.

    inputs: `span` = t - r (), embedded as t is (MeanFlow, arXiv 2505.13447); `token` (k,), a noised class token before
        the patches (REG, arXiv 2507.01467): the network then predicts the pair (that of x, that of the token).
    read_blocks: blocks whose features losses read one at a time.

    size: `S`, `B`, `L` or `XL`. depth, width, heads: replace single numbers of it.
    patch: side of a patch along each axis of an image or a volume, and of a frame of a video, in elements of x.
    patch_frames: frames of a video in a patch.
    positions: one of POSITIONS, see `position_table`. `learned_frames`: parameters for each frame, zero at first, so
        that a network of images can be given frames. `space`: frames have no order. `auto`: `frames` for a video, else
        `axes`.
    attention_axes: `joint`: all tokens attend to each other. `factorised`, for videos: as in Latte (arXiv 2401.03048)
        blocks 0, 2, .. attend within a frame, and blocks 1, 3, .. across frames, at one place.
    mlp_ratio: hidden units of a block, in widths.
    qk_norm: LayerNorm on queries and on keys, each with its own parameters.
    skip: long residual connections: `none`, `release`, `paper`, `skip_dit`, `uvit` or `gate`; see SKIPS.
    skip_init: of the merging Linear: `xavier`, `torch`, `trunc_normal` or `identity`. None: as `skip` has it.
    pairing: which blocks they join where two kinds alternate (`factorised`): `mirror`: block i and L - 1 - i, which are
        of different kinds; `same_kind`: mirror images among the blocks of one kind.
    dtype: of matmuls. Parameters, norms, softmax, embeddings and the output are always float32. So is the time
        embedding, on TPUs too. Other float32 matmuls have jax's default precision, which is bfloat16 on TPUs
        (JAX_DEFAULT_MATMUL_PRECISION=highest changes it). In bfloat16 the gradient of a weight is rounded to bfloat16
        before it is summed over devices.
    stream_dtype: of the residual stream and the features.
    remat: what the backward pass keeps: `named` (the output of each matmul), `dots`, `full` (nothing), `none` (all).
    capture: take features after the merge (`merged`, as the released loss does) or before it (`block`).
    out_channels: of the prediction. None: as the input. A DiT predicts noise and variance and needs twice as many.
    attention: `xla`, `cudnn` or `splash`, all with a float32 softmax (see `attention`). `auto`: cuDNN's kernel on a
        GPU in half precision where it can run, else `xla`.
    unroll: True: one block after another in the program. False: two loops over blocks. None: True on TPUs, where the
        stacks that loops fill and read take a quarter of a training step (estimated). Loops compile several times as
        fast. On a CPU they also run faster and need little more than half of the memory.
    """
    check_inputs("dit", inputs, ("span", "token"))
    shape, classes = tuple(space.shape), space.conditions.classes
    if classes is None:
        raise ConfigError("model dit takes labels, and the conditions of these data are not labels: use another model")
    one_of("model.remat", remat, REMAT)
    one_of("model.capture", capture, ("merged", "block"))
    one_of("model.dtype", dtype, FLOATS)
    one_of("model.stream_dtype", stream_dtype, FLOATS)
    depth, width, heads = _dimensions(size, depth=depth, width=width, heads=heads)
    in_range("model.mlp_ratio", mlp_ratio, 1 / width, MANY / width)
    sides = sides_of(space, patch, patch_frames)
    grid, prefix = grid_of(shape, sides), int("token" in inputs)
    positions = positions_of(space, positions)
    check_table(width, grid if positions == "axes" else grid[1:])
    factorised = one_of("model.attention_axes", attention_axes, ("joint", "factorised")) == "factorised"
    if factorised:
        check_factorised(space, depth, prefix)
    one_of("model.pairing", pairing, ("mirror", "same_kind"))
    if pairing == "same_kind" and (skip == "none" or not factorised):
        raise ConfigError("model.pairing = 'same_kind' needs model.skip and model.attention_axes = 'factorised'")
    out_channels = in_range("model.out_channels", shape[-1] if out_channels is None else out_channels, 1, MANY)
    for block in read_blocks:
        in_range("config.losses: block", block, 0, depth)
    form = skip_of(skip, skip_init)
    kernel = choose(attention, dtype, "span" in inputs, math.prod(grid[factorised:]) + prefix, width // heads)
    axes = ()
    if factorised:  # frames are few, so their attention is small: any kernel will do
        across = choose("auto", dtype, "span" in inputs, grid[0], width // heads)
        axes = Axes(grid[0], False, kernel), Axes(grid[0], True, across)
    unroll = sharding.platform() == "tpu" if unroll is None else unroll
    stack = Stack(tuple(sorted(set(read_blocks))), REMAT[remat], unroll, kinds=max(len(axes), 1))
    block = partial(Block, width, heads, mlp_ratio, "layer" if qk_norm else "none", jnp.dtype(dtype), kernel)
    merge = form and merging(form, width, jnp.dtype(dtype))
    dims, dtypes = (depth, width, sides, positions, out_channels), (jnp.dtype(dtype), jnp.dtype(stream_dtype))
    build = partial(DiT, shape, classes, inputs, *dims, block, merge, form, capture, axes, pairing, stack, *dtypes)
    model = functional(lambda rngs: build(rngs=rngs))
    joined = form and skips(depth, pairing)
    return model._replace(blocks=blocks, rules=RULES, fresh=FRESH, skips=joined, grid=grid, prefix=prefix)


def _dimensions(size: str, **changes: int | None) -> Size:
    """A published size with some of its numbers changed; None: unchanged."""
    dims = SIZES[one_of("model.size", size, SIZES)]
    return check_dimensions(dims._replace(**{name: value for name, value in changes.items() if value is not None}))


def check_dimensions(dims: Size) -> Size:
    """The same dimensions. ConfigError for impossible ones."""
    for name, (least, most) in {"depth": (2, 10_000), "width": (1, MANY), "heads": (1, MANY)}.items():
        in_range(f"model.{name}", getattr(dims, name), least, most)
    if dims.width % dims.heads:
        raise ConfigError(f"model.heads = {dims.heads} does not divide the width {dims.width}")
    return dims


def sides_of(space: Space, patch: int, patch_frames: int = 1) -> tuple[int, ...]:
    """The sides of a patch along each spatial axis of the examples of `space`."""
    in_range("model.patch", patch, 1)
    in_range("model.patch_frames", patch_frames, 1)
    axes = len(space.shape) - 1
    if space.video:
        return patch_frames, *(patch,) * (axes - 1)
    if patch_frames > 1:
        raise ConfigError(f"model.patch_frames = {patch_frames} is for videos, and the examples of these data are none")
    return (patch,) * axes


def grid_of(shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each spatial axis of examples of `shape` (*s, c). ConfigError if the sides do not divide it."""
    *sides, _ = shape
    if not sides or any(side % of for side, of in zip(sides, patch, strict=True)):
        has, wanted = (" x ".join(map(str, numbers)) for numbers in (sides, patch))
        raise ConfigError(f"model.patch: patches of {wanted} do not divide examples of {has}")
    return places(shape, patch)


def positions_of(space: Space, positions: str) -> str:
    """The kind of positions of a network for examples of `space`: `auto` made definite."""
    if one_of("model.positions", positions, POSITIONS) == "auto":
        return "frames" if space.video else "axes"
    if positions != "axes" and not space.video:
        raise ConfigError(f"model.positions = {positions!r} is for videos, and the examples of these data are none")
    return positions


def check_factorised(space: Space, depth: int, prefix: int) -> None:
    """Raise ConfigError for a network whose blocks cannot alternate between space and time."""
    wanted = "model.attention_axes = 'factorised'"
    if not space.video:
        raise ConfigError(f"{wanted} is for videos, and the examples of these data are none")
    if depth % 4:
        raise ConfigError(f"{wanted} needs a depth that is a multiple of 4, given {depth}")
    if prefix:
        raise ConfigError(f"{wanted} has no place for a class token (objective reg)")


def check_table(width: int, grid: tuple[int, ...]) -> None:
    """Raise ConfigError for a width that the fixed position table cannot have."""
    if width % (parts := 2 * len(grid)):
        raise ConfigError(f"model.width = {width}: the position table needs a multiple of {parts}")


def skip_of(skip: str, init: str | None) -> Skip | None:
    """The form of long residual connections, with another initialisation unless `init` is None."""
    form = SKIPS[one_of("model.skip", skip, SKIPS)]
    if init is None:
        return form
    one_of("model.skip_init", init, KERNELS)
    if form is None or form.init is None:
        raise ConfigError(f"model.skip_init = {init!r} has no effect while model.skip is {skip!r}")
    return form._replace(init=init)


def blocks(params: Params) -> list[Params]:
    """The parameters of each block, in order."""
    return each(params["shallow"]) + each(params["deep"])


def skips(depth: int, pairing: str = "mirror") -> Skips:
    """The long residual connections of a network, the innermost first."""
    count = depth // 2
    # two kinds alternate, so the neighbour of a block's mirror image is of the block's own kind
    partners = [i if pairing == "mirror" else i ^ 1 for i in range(count)]
    pairs = tuple((count - partner, depth - count + i + 1) for i, partner in enumerate(partners))

    def norms(params: Params) -> tuple[Array, Array]:
        """Of the two halves of every Linear, [m 2d d], its inputs scaled as the norm before it does; or of a Gate."""
        merges = params["merges"]
        if "gate" in merges:
            return jnp.linalg.norm(jnp.ones_like(merges["gate"]), axis=1), jnp.linalg.norm(merges["gate"], axis=1)
        kernel = merges["linear"]["kernel"]
        weights = kernel if "norm" not in merges else kernel * merges["norm"]["scale"][..., None]
        current, skip = (jnp.linalg.norm(h.reshape(count, -1), axis=1) for h in jnp.split(weights, 2, axis=1))
        return current, skip

    def cut(params: Params, keep: Float[Array, " m"]) -> Params:
        """The Linear reads keep[i] times the skip, and the LayerNorm before it stays as it is; or a Gate takes less."""
        merges = params["merges"]
        if "gate" in merges:
            return params | {"merges": {"gate": merges["gate"] * keep[:, None]}}
        kernel = merges["linear"]["kernel"]
        kernel = kernel.at[:, kernel.shape[1] // 2 :].multiply(keep[:, None, None])
        return params | {"merges": merges | {"linear": merges["linear"] | {"kernel": kernel}}}

    return Skips(pairs, norms, cut)
