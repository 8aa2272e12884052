"""The diffusion transformer of DiT and SiT (arXiv 2212.09748, 2401.08740), with the long residual connections of
DiverseDiT (arXiv 2603.04239, Eq. 8).

Blocks are stacked: each parameter of all blocks of one half is one array with a leading layer axis, and each half is
one `lax.scan`, or, with `unroll`, one block after another. The first half emits its outputs; the second consumes them
in reverse order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from diversedit_jax import sharding
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Model, functional
from diversedit_jax.models.attention import ATTENDED, attend, choose, kept
from diversedit_jax.registry import suggestion

EPS = 1e-6  # of every LayerNorm


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
    """(x_t, t, y, **conditions) -> (prediction, features); see `make` for its options."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        size: Size,
        patch: int,
        mlp_ratio: float,
        qk_norm: bool,
        skip: Skip | None,
        dtype,
        stream_dtype,
        policy: Callable | None,
        capture: str,
        cuts: tuple[int, ...],
        out_channels: int,
        second_time: bool,
        attention: str,
        token_width: int | None,
        unroll: bool,
        *,
        rngs: nnx.Rngs,
    ):
        depth, width, heads = size
        half = depth // 2

        def stack(build: Callable[[nnx.Rngs], nnx.Module], n: int) -> nnx.Module:
            return jax.vmap(lambda key: build(nnx.Rngs(key)))(jax.random.split(rngs.params(), n))

        def block(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, mlp_ratio, qk_norm, dtype, attention, rngs=rngs)

        linear = partial(nnx.Linear, dtype=dtype, kernel_init=KERNELS["xavier"], rngs=rngs)
        self.patch_embed = linear(patch * patch * shape[-1], width)
        self.time_embed = TimeEmbedding(width, rngs=rngs)
        self.span_embed = TimeEmbedding(width, rngs=rngs) if second_time else None
        self.label_embed = nnx.Embed(num_classes + 1, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.shallow = stack(block, half)
        self.deep = stack(block, depth - half)
        self.merges = skip and stack(lambda rngs: Merge(width, skip.norm, skip.init, dtype, rngs=rngs), half)
        self.final_ada = linear(width, 2 * width, kernel_init=nnx.initializers.zeros)
        self.final = linear(width, patch * patch * out_channels, kernel_init=nnx.initializers.zeros)
        self.token_width = token_width
        if token_width is not None:
            self.token_embed = linear(token_width, width)
            self.token_norm = nnx.LayerNorm(width, epsilon=EPS, dtype=jnp.float32, rngs=rngs)
            self.token_final = linear(width, token_width, kernel_init=nnx.initializers.zeros)
        self.shape, self.patch, self.depth, self.width = shape, patch, depth, width
        self.out_shape = (*shape[:-1], out_channels)
        self.skip, self.policy, self.capture, self.cuts = skip, policy, capture, cuts
        self.dtype, self.stream_dtype, self.unroll = dtype, stream_dtype, unroll

    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        y: Int[Array, " b"],
        *,
        span: Float[Array, " b"] | None = None,
        token: Float[Array, "b k"] | None = None,
    ) -> tuple[
        Float[Array, "b h w o"] | tuple[Float[Array, "b h w o"], Float[Array, "b k"]], tuple[Float[Array, "b n d"], ...]
    ]:
        if x_t.shape[1:] != self.shape:
            raise ValueError(f"the network takes images of shape {self.shape}, given {x_t.shape[1:]}")
        x = self.patch_embed(patchify(x_t, self.patch).astype(self.dtype)).astype(jnp.float32)
        x = x + position_table(self.shape, self.patch, self.width)
        if (given := None if token is None else token.shape[1]) != self.token_width:
            takes, found = ("no token" if k is None else f"a token of width {k}" for k in (self.token_width, given))
            raise ValueError(f"the network takes {takes} (model.token_width), given {found}")
        if token is not None:  # at position embedding 0
            first = self.token_norm(self.token_embed(token.astype(self.dtype)))
            x = jnp.concatenate([first[:, None], x], axis=1)
        x = sharding.kept_over_batch(x.astype(self.stream_dtype))
        c = self.time_embed(t) + self.label_embed(y)
        if (span is None) != (self.span_embed is None):
            raise ValueError(f"this network takes {'one time' if span is not None else 'two times: t and t - r'}")
        c = c if span is None else c + self.span_embed(span)
        features = [x]

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

        half = self.depth // 2
        x, outputs, emitted = self._run(plain, x, (self.shallow,), range(half))
        if self.skip is None:
            features += outputs
            x, outputs, _ = self._run(plain, x, (self.deep,), range(half, self.depth))
            features += outputs
        else:
            if self.unroll:
                skips = emitted[::-1]
                features += outputs
            else:
                skips = jnp.flip(emitted, axis=0)
                # Of the stacks of these blocks, that one is kept for the backward pass anyway.
                mirrored = reversed(_unstack(skips))
                features += [
                    own if k in self.cuts else m for k, (own, m) in enumerate(zip(outputs, mirrored, strict=True), 1)
                ]
            middle = self.depth % 2  # with an odd depth the middle block has no partner
            if middle:
                x, outputs, _ = self._run(plain, x, (_slice(self.deep, 0, 1),), range(half, half + 1))
                features += outputs
            layers = (_slice(self.deep, middle, None), self.merges, skips)
            blocks = range(half + middle, self.depth)
            if self.skip.merge == "pre":
                x, outputs, _ = self._run(merged_before, x, layers, blocks)
            elif self.capture == "merged":
                x, outputs, _ = self._run(merged_after, x, layers, blocks)
            else:
                (x, _), outputs, _ = self._run(merged_after_capture, (x, x), layers, blocks)
            features += outputs

        shift, scale = jnp.split(self.final_ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        x = modulate(x, shift, scale).astype(self.dtype)
        out = self.final(x if token is None else x[:, 1:]).astype(jnp.float32)
        image = unpatchify(out, self.out_shape, self.patch)
        prediction = image if token is None else (image, self.token_final(x[:, 0]).astype(jnp.float32))
        return prediction, tuple(features)

    def _run(self, body: Callable, carry, layers: tuple, blocks: range) -> tuple[Any, list[Array], Any]:
        """Apply `body` over the layers of `blocks`; returns the last carry, what each block emits, and that stacked.

        With `unroll` nothing is stacked: what would be is a list.
        """
        if not self.unroll:
            return self._scan(body, carry, layers, blocks)
        step = body if self.policy is None else jax.checkpoint(body, policy=self.policy)
        outputs = []
        for layer in zip(*map(_each, layers), strict=True):
            carry, emitted = step(carry, layer)
            outputs.append(emitted)
        return carry, outputs, outputs

    def _scan(self, body: Callable, carry, layers: tuple, blocks: range) -> tuple[Any, list[Array], Array]:
        """`_run` as a scan.

        It is cut after the blocks in `cuts`: their output is then the carry, or its last part, and does not keep the
        stack alive.
        """
        ends = [k - blocks.start for k in self.cuts if blocks.start < k < blocks.stop]
        outputs, stacks = [], []
        for begin, end in pairwise([0, *ends, len(blocks)]):
            step = body
            if self.policy is not None:  # XLA inlines a loop of one turn, and would then merge what is computed twice
                step = jax.checkpoint(body, policy=self.policy, prevent_cse=end - begin == 1)
            carry, emitted = jax.lax.scan(step, carry, _slice(layers, begin, end))
            outputs += _unstack(emitted)
            outputs[-1] = jax.tree.leaves(carry)[-1]
            stacks.append(emitted)
        return carry, outputs, stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)


def _each(layers) -> list:
    """The layers of a stack, or of a list of them."""
    if isinstance(layers, list):
        return layers
    leaves, structure = jax.tree.flatten(layers)
    return [structure.unflatten(layer) for layer in zip(*map(_unstack, leaves), strict=True)]


def _slice(layers, begin: int, end: int | None):
    return jax.tree.map(lambda p: p if (begin, end) in ((0, None), (0, len(p))) else p[begin:end], layers)


def _unstack(stack: Float[Array, "l ..."]) -> list[Float[Array, "..."]]:
    """The arrays of a stack, in one operation whose gradient is one concatenation."""
    return [part[0] for part in jax.lax.split(stack, (1,) * len(stack), axis=0)]


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b n p"]:
    """Non-overlapping patches in row-major order, each flattened as (row, column, channel)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: Float[Array, "b n p"], shape: tuple[int, int, int], patch: int) -> Float[Array, "b h w c"]:
    """The inverse of `patchify`."""
    h, w, c = shape
    x = x.reshape(-1, h // patch, w // patch, patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)


def position_table(shape: tuple[int, int, int], patch: int, width: int) -> np.ndarray:
    """The fixed 2-D sin-cos table [n d] of DiT: half of the channels encode the column, the others the row."""
    rows, columns = np.meshgrid(np.arange(shape[0] // patch), np.arange(shape[1] // patch), indexing="ij")
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))

    def encode(position: np.ndarray) -> np.ndarray:
        angles = position.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def make(
    shape: tuple[int, int, int],
    num_classes: int,
    cuts: Sequence[int] = (),
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
    second_time: bool = False,
    attention: str = "auto",
    token_width: int | None = None,
    unroll: bool | None = None,
) -> Model:
    """A SiT or DiT for images or latents of `shape` (h, w, c) and labels 0 .. num_classes, the last the null label.

    size: `S`, `B`, `L` or `XL`, of which depth, width and heads may be changed one by one.
    patch: side of a patch, in pixels of the input.
    qk_norm: LayerNorm on queries and on keys, each with its own parameters.
    skip: long residual connections: `none`, `release`, `paper`, `skip_dit` or `uvit`; see SKIPS.
    skip_init: of the merging Linear: `xavier`, `torch`, `trunc_normal` or `identity` (None: as `skip` has it).
    dtype: of matmuls. stream_dtype: of the residual stream and the features. Parameters, norms, softmax, embeddings and
        the output are float32 always, the products of the time embedding also on TPUs. Other products in float32 are as
        precise as jax's default there, which rounds operands to bfloat16 (JAX_DEFAULT_MATMUL_PRECISION=highest: none
        does). In bfloat16, a weight's gradient is rounded to it before it is summed over devices.
    remat: what the backward pass keeps: `named` (the output of each matmul), `dots`, `full` (nothing), `none` (all).
    capture: features are taken after the merge (`merged`, as the released loss does) or before it (`block`).
    out_channels: of the prediction (None: as the input; DiT, which predicts noise and variance, has twice as many).
    second_time: the network also takes `span` = t - r, embedded like t, as MeanFlow's does (arXiv 2505.13447).
    attention: `xla`, `cudnn` or `splash`, all with the softmax in float32, see `models.attention`; `auto` takes cuDNN's
        kernel on a GPU in half precision, but not with second_time: it cannot be differentiated in forward mode; nor
        for an odd number of tokens, or heads whose width is not a multiple of 8.
    token_width: the network also takes `token` [b token_width], a noised class token that stands before the patches,
        and predicts the pair (image's, token's), as REG's does (arXiv 2507.01467).
    unroll: the program has block after block instead of two loops over blocks (None: on TPUs). What a loop hands on, to
        its backward pass or to the other half, lies in stacks, which are filled with zeros, written and read: on a TPU
        a quarter of a training step (estimated). A loop compiles some times as fast; on a CPU it is also faster, and
        needs little more than half of the memory.
    """
    _known("size", size, SIZES)
    _known("skip", skip, SKIPS)
    _known("remat", remat, REMAT)
    _known("capture", capture, ("merged", "block"))
    _known("dtype", dtype, ("float32", "bfloat16", "float16"))
    _known("stream_dtype", stream_dtype, ("float32", "bfloat16", "float16"))
    given = {"depth": depth, "width": width, "heads": heads}
    dims = SIZES[size]._replace(**{name: value for name, value in given.items() if value is not None})
    for name, value in dims._asdict().items():
        if value < 1:
            raise ConfigError(f"model.{name} = {value}: must be positive")
    if dims.depth < 2:
        raise ConfigError(f"model.depth = {dims.depth}: two halves need at least 2 blocks")
    if patch < 1 or shape[0] % patch or shape[1] % patch:
        raise ConfigError(f"model.patch = {patch} does not divide the image of {shape[0]} x {shape[1]}")
    if dims.width % dims.heads:
        raise ConfigError(f"model.heads = {dims.heads} does not divide the width {dims.width}")
    if dims.width % 4:
        raise ConfigError(f"model.width = {dims.width}: the 2-D position table needs a multiple of 4")
    out_channels = shape[-1] if out_channels is None else out_channels
    if out_channels < 1:
        raise ConfigError(f"model.out_channels = {out_channels}: must be positive")
    if token_width is not None and token_width < 1:
        raise ConfigError(f"model.token_width = {token_width}: must be positive")
    for cut in cuts:
        if not 0 <= cut <= dims.depth:
            raise ConfigError(f"a loss reads block {cut}, but the model has {dims.depth} blocks")
    form = SKIPS[skip]
    if skip_init is not None:
        _known("skip_init", skip_init, KERNELS)
        if form is None:
            raise ConfigError(f"model.skip_init = {skip_init!r} has no effect while model.skip is 'none'")
        form = form._replace(init=skip_init)
    tokens = shape[0] * shape[1] // patch**2 + (token_width is not None)
    build = partial(
        DiT,
        shape,
        num_classes,
        dims,
        patch,
        mlp_ratio,
        qk_norm,
        form,
        jnp.dtype(dtype),
        jnp.dtype(stream_dtype),
        REMAT[remat],
        capture,
        tuple(sorted(set(cuts))),
        out_channels,
        second_time,
        choose(attention, dtype, second_time, tokens, dims.width // dims.heads),
        token_width,
        sharding.platform() == "tpu" if unroll is None else unroll,
    )
    return functional(lambda rngs: build(rngs=rngs))._replace(token_width=token_width)


def _known(option: str, value: str, choices) -> None:
    if value not in choices:
        raise ConfigError(f"model.{option} = {value!r} is unknown; {suggestion(value, choices)}")
