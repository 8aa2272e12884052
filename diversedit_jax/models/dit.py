"""The diffusion transformer of DiT and SiT (arXiv 2212.09748, 2401.08740), with the long residual connections of
DiverseDiT (arXiv 2603.04239, Eq. 8).

The blocks are two stacks, `shallow` and `deep` (see `stack`). The shallow half hands its outputs on; the deep half
merges them in reverse order. Tokens are patches of an image, a video or a volume.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from diversedit_jax import sharding
from diversedit_jax.api import Model, Params, Skips, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import check_inputs, functional
from diversedit_jax.models.attention import ATTENDED, attend, choose, kept
from diversedit_jax.models.stack import Stack, each, part, stacked, unstack
from diversedit_jax.registry import in_range, one_of

EPS = 1e-6  # of every LayerNorm
HALVES = ("shallow", "deep")

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
    init:  of the Linear's kernel, a name of KERNELS.
    """

    merge: str
    norm: bool
    init: str


SKIPS = {
    "none": None,
    "release": Skip("post", norm=True, init="xavier"),  # DiverseDiT as its authors' code has it
    "paper": Skip("pre", norm=True, init="xavier"),  # DiverseDiT as Eq. 8 has it
    "skip_dit": Skip("pre", norm=True, init="torch"),  # arXiv 2411.17616
    "uvit": Skip("pre", norm=False, init="trunc_normal"),  # arXiv 2209.12152
}


def _identity_on_current(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """Zero for the skip and the identity for the current stream."""
    return jnp.eye(*shape, dtype=dtype)


KERNELS = {
    "xavier": nnx.initializers.xavier_uniform(),
    "torch": nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # torch's default for Linear
    "trunc_normal": nnx.initializers.truncated_normal(0.02),
    "identity": _identity_on_current,
}

# What the backward pass keeps of a block beside its input; the rest is computed again.
NAMES = ("ada", "qkv", ATTENDED, "proj", "fc1", "fc2", "moments")
POLICIES = jax.checkpoint_policies
REMAT = {
    # the output of every matmul, and of every kernel of attention
    "named": POLICIES.save_from_both_policies(POLICIES.save_only_these_names(*NAMES), kept),
    "dots": POLICIES.dots_with_no_batch_dims_saveable,
    "full": POLICIES.nothing_saveable,
    "none": None,  # everything is kept
}


def layer_norm(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """LayerNorm without parameters, in float32."""
    x = x.astype(jnp.float32)
    x = x - checkpoint_name(x.mean(axis=-1, keepdims=True), "moments")
    return x * jax.lax.rsqrt(checkpoint_name(jnp.mean(x * x, axis=-1, keepdims=True), "moments") + EPS)


def modulate(x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Float[Array, "b n d"]:
    """adaLN: the normalised features, scaled and shifted by the condition, in float32."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


class Block(nnx.Module):
    """A transformer block with adaLN-Zero (DiT, section 3.2)."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, dtype, attention: str = "xla", *, rngs: nnx.Rngs
    ):
        hidden = int(width * mlp_ratio)
        linear = partial(nnx.Linear, dtype=dtype, kernel_init=KERNELS["xavier"], rngs=rngs)
        self.ada = linear(width, 6 * width, kernel_init=nnx.initializers.zeros)
        self.qkv = nnx.LinearGeneral(
            width, (3, heads, width // heads), dtype=dtype, kernel_init=KERNELS["xavier"], rngs=rngs
        )
        norm = partial(nnx.LayerNorm, width // heads, epsilon=EPS, dtype=jnp.float32, rngs=rngs)
        self.q_norm = norm() if qk_norm else None
        self.k_norm = norm() if qk_norm else None
        self.proj = linear(width, width)
        self.fc1 = linear(width, hidden)
        self.fc2 = linear(hidden, width)
        self.dtype, self.attention = dtype, attention

    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        ada = checkpoint_name(self.ada(jax.nn.silu(c)), "ada").astype(jnp.float32)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(ada, 6, axis=-1)
        x = x + (gate_a[:, None] * self._attention(modulate(x, shift_a, scale_a))).astype(x.dtype)
        x = x + (gate_m[:, None] * self._mlp(modulate(x, shift_m, scale_m))).astype(x.dtype)
        return sharding.kept_over_batch(x)

    def _attention(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        qkv = checkpoint_name(self.qkv(x.astype(self.dtype)), "qkv")
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        if self.q_norm is not None:
            q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        out = attend(q, k, v, self.attention)
        return checkpoint_name(self.proj(out.reshape(x.shape)), "proj")

    def _mlp(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        hidden = checkpoint_name(self.fc1(x.astype(self.dtype)), "fc1")
        return checkpoint_name(self.fc2(jax.nn.gelu(hidden, approximate=True)), "fc2")


class Merge(nnx.Module):
    """A long residual connection: Linear(LayerNorm(concat[current, skip])), 2 d -> d, replacing the current stream.

    With init `identity` it changes nothing at first, so that a trained network can be given connections. No kernel
    undoes a norm: with one, the merge then adds to the current stream, from zero, instead of replacing it.
    """

    def __init__(self, width: int, norm: bool, init: str, dtype, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(2 * width, epsilon=EPS, dtype=jnp.float32, rngs=rngs) if norm else None
        self.adds = norm and init == "identity"
        kernel = nnx.initializers.zeros if self.adds else KERNELS[init]
        self.linear = nnx.Linear(2 * width, width, dtype=dtype, kernel_init=kernel, rngs=rngs)
        if init == "torch":  # whose biases are as random as the weights
            bound = (2 * width) ** -0.5
            self.linear.bias = nnx.Param(jax.random.uniform(rngs.params(), (width,), minval=-bound, maxval=bound))

    def __call__(self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        both = jnp.concatenate([x, skip], axis=-1)
        both = both if self.norm is None else layer_norm(both) * self.norm.scale + self.norm.bias
        merged = self.linear(both).astype(x.dtype)
        return x + merged if self.adds else merged


class TimeEmbedding(nnx.Module):
    """The sinusoids of t, not multiplied by 1000, through a two-layer MLP, in float32."""

    def __init__(self, width: int, frequencies: int = 256, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, kernel_init=nnx.initializers.normal(0.02), precision="highest", rngs=rngs)
        self.fc1 = linear(frequencies, width)
        self.fc2 = linear(width, width)
        self.frequencies = frequencies

    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b d"]:
        half = self.frequencies // 2
        angles = t.astype(jnp.float32)[:, None] * np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
        return self.fc2(jax.nn.silu(self.fc1(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1))))


class DiT(nnx.Module):
    """(x_t, t, y, **inputs) -> (prediction, features); see `make` for its options."""

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        size: Size,
        patch: int,
        mlp_ratio: float,
        qk_norm: bool,
        skip: Skip | None,
        dtype,
        stream_dtype,
        capture: str,
        out_channels: int,
        second_time: bool,
        attention: str,
        token_width: int | None,
        stack: Stack,
        *,
        rngs: nnx.Rngs,
    ):
        depth, width, heads = size
        half = depth // 2

        def block(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, mlp_ratio, qk_norm, dtype, attention, rngs=rngs)

        def merge(rngs: nnx.Rngs) -> Merge:
            return Merge(width, skip.norm, skip.init, dtype, rngs=rngs)

        numbers = patch ** (len(shape) - 1)  # elements of a patch, for each channel
        linear = partial(nnx.Linear, dtype=dtype, kernel_init=KERNELS["xavier"], rngs=rngs)
        self.patch_embed = linear(numbers * shape[-1], width)
        self.time_embed = TimeEmbedding(width, rngs=rngs)
        self.span_embed = TimeEmbedding(width, rngs=rngs) if second_time else None
        self.label_embed = nnx.Embed(num_classes + 1, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.shallow = stacked(block, half, rngs)
        self.deep = stacked(block, depth - half, rngs)
        self.merges = skip and stacked(merge, half, rngs)
        self.final_ada = linear(width, 2 * width, kernel_init=nnx.initializers.zeros)
        self.final = linear(width, numbers * out_channels, kernel_init=nnx.initializers.zeros)
        if token_width is not None:
            self.token_embed = linear(token_width, width)
            self.token_norm = nnx.LayerNorm(width, epsilon=EPS, dtype=jnp.float32, rngs=rngs)
            self.token_final = linear(width, token_width, kernel_init=nnx.initializers.zeros)
        self.shape, self.out_shape, self.patch, self.depth = shape, (*shape[:-1], out_channels), patch, depth
        self.inputs = frozenset(["span"] * second_time + ["token"] * (token_width is not None))
        self.skip, self.capture, self.stack = skip, capture, stack
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
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"the network takes examples of shape {self.shape}, given {x_t.shape[1:]}")
        given = {name for name, value in {"span": span, "token": token}.items() if value is not None}
        if given != self.inputs:
            takes, found = (", ".join(sorted(names)) or "no further input" for names in (self.inputs, given))
            raise ValueError(f"the network takes {takes}, given {found}")
        x = self._embedded(x_t, token)
        c = self.time_embed(t) + self.label_embed(y)
        c = c if span is None else c + self.span_embed(span)
        x, features = self._blocks(x, c)
        return self._output(x, c, token is not None), features

    def _embedded(self, x_t: Float[Array, "b *s c"], token: Float[Array, "b k"] | None) -> Float[Array, "b n d"]:
        """The patches with their positions, behind the class token if there is one, which has position 0."""
        x = self.patch_embed(patchify(x_t, self.patch).astype(self.dtype)).astype(jnp.float32)
        x = x + position_table(tuple(side // self.patch for side in self.shape[:-1]), x.shape[-1])
        if token is not None:
            first = self.token_norm(self.token_embed(token.astype(self.dtype)))
            x = jnp.concatenate([first[:, None], x], axis=1)
        return sharding.kept_over_batch(x.astype(self.stream_dtype))

    def _output(self, x: Float[Array, "b n d"], c: Float[Array, "b d"], token: bool):
        """The prediction: adaLN, a Linear, the patches put together; with a class token the pair."""
        shift, scale = jnp.split(self.final_ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        x = modulate(x, shift, scale).astype(self.dtype)
        out = self.final(x[:, 1:] if token else x).astype(jnp.float32)
        image = unpatchify(out, self.out_shape, self.patch)
        return (image, self.token_final(x[:, 0]).astype(jnp.float32)) if token else image

    def _blocks(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]):
        """All blocks: the last stream and the features. Long residual connections follow Eq. 8 of DiverseDiT:

            x_j <- Linear(LayerNorm([x_j, x_i])),  i = L - 1 - j,  for every deep block j (blocks counted from 0)

        applied after block j (`post`, as released) or to its input (`pre`, as the paper writes it).
        """

        def plain(x: Array, layer: tuple[Block]):
            (block,) = layer
            x = block(x, c)
            return x, x

        def merged_after(x: Array, layer: tuple[Block, Merge, Array]):
            block, merge, skip = layer
            x = merge(block(x, c), skip)
            return x, x

        def merged_after_capture(streams: tuple[Array, Array], layer: tuple[Block, Merge, Array]):
            block, merge, skip = layer
            before = block(streams[0], c)
            return (merge(before, skip), before), before

        def merged_before(x: Array, layer: tuple[Block, Merge, Array]):
            block, merge, skip = layer
            return plain(merge(x, skip), (block,))

        half, middle = self.depth // 2, self.depth % 2  # with an odd depth the middle block has no partner
        features = [x]
        x, outputs, emitted = self.stack.run(plain, x, (self.shallow,), 0)
        if self.skip is None:
            x, deep, _ = self.stack.run(plain, x, (self.deep,), half)
            return x, (*features, *outputs, *deep)
        skips, outputs = self._skips(emitted, outputs)
        features += outputs
        if middle:
            x, outputs, _ = self.stack.run(plain, x, (part(self.deep, 0, 1),), half)
            features += outputs
        layers = (part(self.deep, middle), self.merges, skips)
        body, carry = merged_after, x
        if self.skip.merge == "pre":
            body = merged_before
        elif self.capture == "block":
            body, carry = merged_after_capture, (x, x)
        x, deep, _ = self.stack.run(body, carry, layers, half + middle)
        return (x[0] if body is merged_after_capture else x), (*features, *deep)

    def _skips(self, emitted: Array | list[Array], outputs: list[Array]) -> tuple[Array | list[Array], list[Array]]:
        """What the deep blocks merge, the last shallow block's output first; and the features of the shallow half.

        A loop keeps the reversed stack for the backward pass anyway, so the features are read from it.
        """
        if self.stack.unroll:
            return emitted[::-1], outputs
        skips = jnp.flip(emitted, axis=0)
        mirrored = unstack(skips)[::-1]
        cuts = self.stack.cuts
        return skips, [own if k in cuts else m for k, (own, m) in enumerate(zip(outputs, mirrored, strict=True), 1)]


def patchify(x: Float[Array, "b *s c"], patch: int) -> Float[Array, "b n p"]:
    """Patches of side `patch` in row-major order, each flattened as (place in the patch, channel)."""
    b, *sides, c = x.shape
    axes = len(sides)
    x = x.reshape(b, *(n for side in sides for n in (side // patch, patch)), c)
    x = x.transpose(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(b, math.prod(side // patch for side in sides), patch**axes * c)


def unpatchify(x: Float[Array, "b n p"], shape: tuple[int, ...], patch: int) -> Float[Array, "b *s c"]:
    """The inverse of `patchify`, for examples of `shape` (*s, c)."""
    *sides, c = shape
    axes = len(sides)
    x = x.reshape(-1, *(side // patch for side in sides), *(patch,) * axes, c)
    x = x.transpose(0, *(i for axis in range(axes) for i in (1 + axis, 1 + axes + axis)), 2 * axes + 1)
    return x.reshape(-1, *shape)


def position_table(grid: tuple[int, ...], width: int) -> np.ndarray:
    """The fixed sin-cos table [n d] of DiT, for a grid of patches with any number of axes.

    The channels are divided evenly among the axes, the last axis first: of an image, half encode the column, the others
    the row.
    """
    per_axis = width // (2 * len(grid))
    frequencies = 10000.0 ** -(np.arange(per_axis) / per_axis)
    places = np.meshgrid(*map(np.arange, grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in reversed(places)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def make(
    space: Space,
    inputs: Mapping[str, tuple[int, ...]],
    cuts: tuple[int, ...] = (),
    *,
    size: str = "B",
    patch: int = 2,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    mlp_ratio: float = 4.0,
    qk_norm: bool = False,
    skip: str = "none",
    skip_init: str | None = None,
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
    cuts: the features that losses read one at a time.

    size: `S`, `B`, `L` or `XL`; depth, width and heads may be changed one by one.
    patch: side of a patch along each spatial axis, in elements of x.
    qk_norm: LayerNorm on queries and on keys, each with its own parameters.
    skip: long residual connections: `none`, `release`, `paper`, `skip_dit` or `uvit`; see SKIPS.
    skip_init: of the merging Linear: `xavier`, `torch`, `trunc_normal` or `identity`. None: as `skip` has it.
    dtype: of matmuls. Parameters, norms, softmax, embeddings and the output are always float32; so are the products of
        the time embedding, on TPUs too. Other products in float32 are as precise as jax's default, which on TPUs rounds
        operands to bfloat16 (JAX_DEFAULT_MATMUL_PRECISION=highest prevents it). In bfloat16 the gradient of a weight is
        rounded to bfloat16 before it is summed over devices.
    stream_dtype: of the residual stream and the features.
    remat: what the backward pass keeps: `named` (the output of each matmul), `dots`, `full` (nothing), `none` (all).
    capture: features are taken after the merge (`merged`, as the released loss does) or before it (`block`).
    out_channels: of the prediction. None: as the input. DiT predicts noise and variance and has twice as many.
    attention: `xla`, `cudnn` or `splash`, all with a float32 softmax (see `attention`). `auto`: cuDNN's kernel on a
        GPU in half precision where it can run, else `xla`.
    unroll: one block after another in the program instead of two loops over blocks. None: on TPUs. A loop passes stacks
        on to its backward pass and to the other half. They are filled with zeros, written and read, on a TPU in a
        quarter of the time of a training step (estimated). A loop compiles several times as fast; on a CPU it is also
        faster, and needs little more than half of the memory.
    """
    check_inputs("dit", inputs, ("span", "token"))
    shape, classes = tuple(space.shape), space.conditions.classes
    if classes is None:
        raise ConfigError("model dit takes labels, and the conditions of these data are not labels: use another model")
    one_of("model.size", size, SIZES)
    one_of("model.skip", skip, SKIPS)
    one_of("model.remat", remat, REMAT)
    one_of("model.capture", capture, ("merged", "block"))
    one_of("model.dtype", dtype, ("float32", "bfloat16", "float16"))
    one_of("model.stream_dtype", stream_dtype, ("float32", "bfloat16", "float16"))
    given = {"depth": depth, "width": width, "heads": heads}
    dims = SIZES[size]._replace(**{name: value for name, value in given.items() if value is not None})
    in_range("model.depth", dims.depth, 2)
    in_range("model.width", dims.width, 1)
    in_range("model.heads", dims.heads, 1)
    in_range("model.patch", patch, 1)
    out_channels = in_range("model.out_channels", shape[-1] if out_channels is None else out_channels, 1)
    if len(shape) < 2 or any(side % patch for side in shape[:-1]):
        raise ConfigError(f"model.patch = {patch} does not divide {' x '.join(map(str, shape[:-1]))}")
    if dims.width % dims.heads:
        raise ConfigError(f"model.heads = {dims.heads} does not divide the width {dims.width}")
    if dims.width % (parts := 2 * (len(shape) - 1)):
        raise ConfigError(f"model.width = {dims.width}: the position table needs a multiple of {parts}")
    for cut in cuts:
        if not 0 <= cut <= dims.depth:
            raise ConfigError(f"a loss reads block {cut}, but the model has {dims.depth} blocks")
    form = SKIPS[skip]
    if skip_init is not None:
        one_of("model.skip_init", skip_init, KERNELS)
        if form is None:
            raise ConfigError(f"model.skip_init = {skip_init!r} has no effect while model.skip is 'none'")
        form = form._replace(init=skip_init)
    grid, prefix = tuple(side // patch for side in shape[:-1]), int("token" in inputs)
    forward_mode = "span" in inputs
    kernel = choose(attention, dtype, forward_mode, math.prod(grid) + prefix, dims.width // dims.heads)
    unroll = sharding.platform() == "tpu" if unroll is None else unroll
    build = partial(
        DiT,
        shape,
        classes,
        dims,
        patch,
        mlp_ratio,
        qk_norm,
        form,
        jnp.dtype(dtype),
        jnp.dtype(stream_dtype),
        capture,
        out_channels,
        forward_mode,
        kernel,
        inputs["token"][0] if prefix else None,
        Stack(tuple(sorted(set(cuts))), REMAT[remat], unroll),
    )
    model = functional(lambda rngs: build(rngs=rngs))
    return model._replace(
        blocks=blocks, rules=RULES, fresh=("merges",), skips=form and skips(dims.depth), grid=grid, prefix=prefix
    )


def blocks(params: Params) -> list[Params]:
    """The parameters of each block, in order."""
    return [block for half in HALVES for block in each(params[half])]


def skips(depth: int) -> Skips:
    """The long residual connections of a network, the innermost first."""
    count = depth // 2
    pairs = tuple((count - i, depth - count + i + 1) for i in range(count))

    def norms(params: Params) -> tuple[Array, Array]:
        """Of the two halves of every Linear, [m 2d d], its inputs scaled as the norm before it does."""
        merges = params["merges"]
        kernel = merges["linear"]["kernel"]
        weights = kernel if "norm" not in merges else kernel * merges["norm"]["scale"][..., None]
        current, skip = (jnp.linalg.norm(h.reshape(count, -1), axis=1) for h in jnp.split(weights, 2, axis=1))
        return current, skip

    def cut(params: Params, keep: Float[Array, " m"]) -> Params:
        """The Linear reads keep[i] times the skip; the LayerNorm before it stays as it is."""
        merges = params["merges"]
        kernel = merges["linear"]["kernel"]
        kernel = kernel.at[:, kernel.shape[1] // 2 :].multiply(keep[:, None, None])
        return params | {"merges": merges | {"linear": merges["linear"] | {"kernel": kernel}}}

    return Skips(pairs, norms, cut)
