"""The diffusion transformer of DiT and SiT (arXiv 2212.09748, 2401.08740), with the long residual connections of
DiverseDiT (arXiv 2603.04239, Eq. 8).

The first half of the blocks is one stack, `shallow`, the second half another, `deep` (see `stack`). Each deep block is
merged with the output of its shallow partner: the last with the first. Tokens are patches of an image, a video or a
volume.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from diversedit_jax import sharding
from diversedit_jax.api import Made, Model, Params, Skips, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Keys, adapt, check_inputs, functional
from diversedit_jax.models.attention import ATTENDED, attend, choose, kept
from diversedit_jax.models.patches import Patches, check_table, patches_of, patchify, positions_of, unpatchify
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
        patches: Patches,
        num_classes: int,
        inputs: Mapping[str, tuple[int, ...]],
        depth: int,
        width: int,
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
        numbers = math.prod(patches.sides)  # elements of a patch, for each channel
        linear = partial(nnx.Linear, dtype=dtype, kernel_init=KERNELS["xavier"], rngs=rngs)
        zeros = nnx.initializers.zeros
        self.patch_embed = linear(numbers * patches.shape[-1], width)
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
        if patches.positions == "learned_frames":
            self.frame_positions = nnx.Param(jnp.zeros((patches.grid[0], width)))
        self.patches, self.out_shape, self.depth = patches, (*patches.shape[:-1], out_channels), depth
        self.inputs, self.skip, self.capture, self.stack = frozenset(inputs), skip, capture, stack
        self.axes, self.pairing = axes, pairing
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
            With pairing `same_kind`, i is the mirror image of j among the blocks of its kind.
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
        if x_t.shape[1:] != (shape := self.patches.shape):
            raise ValueError(f"the network takes examples of shape {shape}, given {x_t.shape[1:]}")
        given = {name for name, value in inputs.items() if value is not None}
        if given != self.inputs:
            takes, found = (", ".join(sorted(names)) or "no further input" for names in (self.inputs, given))
            raise ValueError(f"the network takes {takes}, given {found}")

    def _embed(self, x_t: Float[Array, "b *s c"], token: Float[Array, "b k"] | None) -> Float[Array, "b n d"]:
        """The patches with their positions. A class token comes before them, without a position."""
        h = self.patch_embed(patchify(x_t, self.patches.sides).astype(self.dtype)).astype(jnp.float32)
        h = h + self.patches.table(h.shape[-1])
        if self.patches.positions == "learned_frames":
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
        image = unpatchify(out, self.out_shape, self.patches.sides)
        return (image, self.token_final(h[:, 0]).astype(jnp.float32)) if token else image


def in_pairs(layers: Any) -> Any:
    """Stacked layers, two in each: the leading axis l becomes [l / 2, 2]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), layers)


def make(
    space: Space,
    inputs: Mapping[str, tuple[int, ...]],
    read_blocks: tuple[int, ...] = (),
    *,
    size: str = "B",
    patch: int = 2,
    patch_frames: int = 1,
    positions: str = "auto",
    base_grid: int | None = None,
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
    patch, patch_frames, positions, base_grid: see `models.patches.patches_of`.
    attention_axes, pairing: for videos, see `check_axes`.
    mlp_ratio: hidden units of a block, in widths.
    qk_norm: LayerNorm on queries and on keys, each with its own parameters.
    skip: long residual connections: `none`, `release`, `paper`, `skip_dit`, `uvit` or `gate`; see SKIPS.
    skip_init: of the merging Linear: `xavier`, `torch`, `trunc_normal` or `identity`. None: as `skip` has it.
    dtype: of matmuls. Parameters, norms, softmax, embeddings and the output are always float32. So is the time
        embedding, on TPUs too. Other float32 matmuls have jax's default precision, which is bfloat16 on TPUs
        (JAX_DEFAULT_MATMUL_PRECISION=highest changes it). In bfloat16 the gradient of a weight is rounded to bfloat16
        before it is summed over devices.
    stream_dtype: of the residual stream and the features.
    remat, unroll: see `stack_of`.
    capture: take features after the merge (`merged`, as the released loss does) or before it (`block`).
    out_channels: of the prediction. None: as the input. A DiT predicts noise and variance and needs twice as many.
    attention: `xla`, `cudnn` or `splash`, all with a float32 softmax (see `attention`). `auto`: cuDNN's kernel on a
        GPU in half precision where it can run, else `xla`.
    """
    check_inputs("dit", inputs, ("span", "token"))
    if (classes := space.conditions.classes) is None:
        raise ConfigError("model dit takes labels, and the conditions of these data are not labels: use another model")
    check_options(dtype, stream_dtype, capture)
    depth, width, heads = _dimensions(size, depth=depth, width=width, heads=heads)
    in_range("model.mlp_ratio", mlp_ratio, 1 / width, MANY / width)
    patches, prefix = patches_of(space, patch, patch_frames, positions, base_grid), int("token" in inputs)
    check_table(width, patches)
    check_axes(space, attention_axes, pairing, depth, prefix, skip)
    out_channels = space.shape[-1] if out_channels is None else in_range("model.out_channels", out_channels, 1, MANY)
    form, parts = skip_of(skip, skip_init), patches.grid if attention_axes == "joint" else patches.grid[1:]
    choice = partial(choose, dtype=dtype, forward_mode="span" in inputs, width=width // heads)
    kernel = choice(attention, tokens=math.prod(parts) + prefix)
    axes: tuple[Axes, ...] = ()
    if attention_axes == "factorised":  # frames are few, so attention across them is small: any kernel will do
        frames = patches.grid[0]
        axes = Axes(frames, False, kernel), Axes(frames, True, choice("auto", tokens=frames))
    stack = stack_of(read_blocks, depth, remat, unroll, kinds=max(len(axes), 1))
    block = partial(Block, width, heads, mlp_ratio, "layer" if qk_norm else "none", jnp.dtype(dtype), kernel)
    merge = form and merging(form, width, jnp.dtype(dtype))
    dims, dtypes = (depth, width, out_channels), (jnp.dtype(dtype), jnp.dtype(stream_dtype))
    build = partial(DiT, patches, classes, inputs, *dims, block, merge, form, capture, axes, pairing, stack, *dtypes)
    known = {"blocks": blocks, "rules": RULES, "fresh": FRESH, "adapted": adapted, "grid": patches.grid}
    model = functional(lambda rngs: build(rngs=rngs))
    return model._replace(**known, skips=form and skips(depth, pairing), prefix=prefix)


def check_options(dtype: str, stream_dtype: str, capture: str = "merged") -> None:
    """Raise ConfigError for a word that no option of `make` has."""
    one_of("model.dtype", dtype, FLOATS)
    one_of("model.stream_dtype", stream_dtype, FLOATS)
    one_of("model.capture", capture, ("merged", "block"))


def stack_of(read_blocks: Sequence[int], depth: int, remat: str, unroll: bool | None, kinds: int = 1) -> Stack:
    """How the blocks of a network of this depth run, for options of a model. ConfigError for a block that it lacks.

    remat: what the backward pass keeps: `named` (the output of each matmul), `dots`, `full` (nothing), `none` (all).
    unroll: True: one block after another in the program. False: two loops over blocks. None: True on TPUs, where the
        stacks that loops fill and read take a quarter of a training step (estimated). Loops compile several times as
        fast. On a CPU they also run faster and need little more than half of the memory.
    """
    one_of("model.remat", remat, REMAT)
    for block in read_blocks:
        in_range("config.losses: block", block, 0, depth)
    unroll = sharding.platform() == "tpu" if unroll is None else unroll
    return Stack(tuple(sorted(set(read_blocks))), REMAT[remat], unroll, kinds)


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


def check_axes(space: Space, attention_axes: str, pairing: str, depth: int, prefix: int, skip: str) -> None:
    """Raise ConfigError for options of videos that do not fit.

    attention_axes: `joint`: all tokens attend to each other. `factorised`, for videos: as in Latte (arXiv 2401.03048)
        blocks 0, 2, .. attend within a frame, and blocks 1, 3, .. across frames, at one place.
    pairing: which blocks long residual connections join where two kinds alternate: `mirror`: block i and L - 1 - i,
        which are of different kinds; `same_kind`: mirror images among the blocks of one kind.
    """
    one_of("model.attention_axes", attention_axes, ("joint", "factorised"))
    wanted = "model.attention_axes = 'factorised'"
    one_of("model.pairing", pairing, ("mirror", "same_kind"))
    if pairing == "same_kind" and (skip == "none" or attention_axes == "joint"):
        raise ConfigError(f"model.pairing = 'same_kind' needs model.skip and {wanted}")
    if attention_axes == "joint":
        return
    if not space.video:
        raise ConfigError(f"{wanted} is for videos, and the examples of these data are none")
    if depth % 4:
        raise ConfigError(f"{wanted} needs a depth that is a multiple of 4, given {depth}")
    if prefix:
        raise ConfigError(f"{wanted} has no place for a class token (objective reg)")


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


def adapted(was: Made, now: Made) -> tuple[Params, list[str]]:
    """The parameters of a DiT, changed to fit another one, see `api.Model`.

    The other may have other classes, another grid, other patches; an image network may become one of videos.
    """
    adapt.check_name(was, now)
    to_video = was.space.kind == "images" and now.space.video
    if not to_video and was.space.kind != now.space.kind:
        raise ConfigError(
            f"its network makes {was.space.kind}, that of this run {now.space.kind}: only a network of images can "
            "become another, one of videos"
        )
    check_merges(was, now)
    params, told = adapt.new_labels(was, now, was.params)
    old = ((1,) if to_video else ()) + adapt.patch_sides(was)
    params, resized = adapt.new_patches(params, old, adapt.patch_sides(now), was.space.shape[-1])
    told += resized + new_places(was, now)
    factorised = [made.options["attention_axes"] == "factorised" for made in (was, now)]
    if to_video and factorised[1]:
        params, more = in_every_frame(params, was, now)
        told += more
    elif factorised[0] != factorised[1]:
        raise ConfigError("config.model.attention_axes: its network attends along other axes")
    kinds = [positions_of(made.space, made.options["positions"]) for made in (was, now)]
    if was.space.video and kinds[0] != kinds[1]:
        told.append(f"its positions are of the kind {kinds[0]!r}, those of this run {kinds[1]!r}")
    if to_video and kinds[1] == "frames":
        told.append(
            "positions of frames are added: only the first frame is at first as it was; with "
            "--config.model.positions=learned_frames all are"
        )
    return params, told + new_merges(was, now)


def new_places(was: Made, now: Made) -> list[str]:
    """A line if the fixed positions are others than those that a network knows."""
    old, new = (adapt.grid(made)[int(made.space.video) :] for made in (was, now))  # frames have a table of their own
    knows, has = (
        grid if made.options["base_grid"] is None else (made.options["base_grid"],) * len(grid)
        for made, grid in ((was, old), (now, new))
    )
    if (old, knows) == (new, has):
        return []
    told = f"its positions are those of {adapt.by(knows)} patches, and this run has {adapt.by(new)}"
    if knows == has:
        return [f"{told}: they are spread over them"]
    told += ", some of which it never saw" if max(has) > max(knows) else ""
    return [f"{told}; to spread them: --config.model.base_grid={knows[0]}" if len(set(knows)) == 1 else told]


def new_merges(was: Made, now: Made) -> list[str]:
    """A line if long residual connections are new and change what a network gives."""
    form = skip_of(now.options["skip"], now.options["skip_init"])
    if form is None or "merges" in was.params or form.init in (None, "identity"):
        return []
    return [
        "its long residual connections are new and change what it gives; with --config.model.skip_init=identity they "
        "change nothing at first"
    ]


def check_merges(was: Made, now: Made) -> None:
    """Raise ConfigError if the arrays of long residual connections would mean something else than they did."""
    if "merges" not in was.params:
        return

    def meaning(made: Made) -> tuple | None:
        form = skip_of(made.options["skip"], made.options["skip_init"])
        pairs = made.options["pairing"] if was.space.video else None
        return form and (form.merge, form.norm, form.init is None, form.norm and form.init == "identity", pairs)

    if meaning(was) != meaning(now):
        names = [name for name in ("skip", "skip_init", "pairing") if name in now.options]
        old, new = (", ".join(f"{name} = {made.options[name]!r}" for name in names) for made in (was, now))
        raise ConfigError(
            f"its long residual connections have {old}, those of config.model {new}, which does not go on with them; "
            "to add new ones: --config.init_from.fresh=\"('merges',)\""
        )


def in_every_frame(params: Params, was: Made, now: Made) -> tuple[Params, list[str]]:
    """An image network in the blocks within frames of a video network; the blocks across frames are new.

    Each of these is the identity at first. A connection between two blocks of the image network stays one.
    """
    if missing := {"shallow", "deep"} - params.keys():
        raise ConfigError(f"config.init_from.fresh: {min(missing)} holds blocks of its network, which is to keep them")
    stacks = [params["shallow"], params["deep"]]
    depths = [sum(len(jax.tree.leaves(made.params[name])[0]) for name in ("shallow", "deep")) for made in (was, now)]
    if depths[1] != 2 * depths[0]:
        raise ConfigError(
            f"its depth is {depths[0]}: a factorised network of videos needs config.model.depth = {2 * depths[0]}, "
            f"given {depths[1]}"
        )
    half = depths[0]
    parts = {"shallow": adapt.interleaved(stacks, 0, half), "deep": adapt.interleaved(stacks, half, half)}
    told = [f"its {depths[0]} blocks become blocks 0, 2, .., which attend within a frame; blocks 1, 3, .. are new"]
    if "merges" in params:
        form = skip_of(now.options["skip"], now.options["skip_init"])
        if now.options["pairing"] != "same_kind" or form.init not in (None, "identity"):
            raise ConfigError(
                "its long residual connections stay between its own blocks, and new ones must change nothing: that "
                "needs config.model.pairing = 'same_kind' and skip = 'gate', or skip_init = 'identity' there and here; "
                "to start all anew: --config.init_from.fresh=\"('merges',)\""
            )
        parts["merges"] = adapt.interleaved([params["merges"]], 0, half)
    return {**params, **parts}, told
