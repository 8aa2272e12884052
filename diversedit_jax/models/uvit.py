"""U-ViT (arXiv 2209.12152): a transformer whose time and condition are tokens, with long skip connections.

`depth` // 2 blocks, `ins`, come before one block, `mid`, and as many, `outs`, behind it. Each out block first merges
the stream with the output of its partner: the last with the first.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from diversedit_jax import sharding
from diversedit_jax.api import Condition, Conditions, Made, Model, Params, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Keys, adapt, check_inputs, dit, functional
from diversedit_jax.models.attention import attend, choose
from diversedit_jax.models.dit import KERNELS, SKIPS, Merge, Perceptron
from diversedit_jax.models.patches import Patches, patches_of, patchify, unpatchify
from diversedit_jax.models.stack import Stack, each, stacked
from diversedit_jax.registry import MANY, in_range, one_of

EPS = 1e-5  # of every LayerNorm
KERNEL = KERNELS["trunc_normal"]  # of every Linear, and of the position table
FORMS = ("uvit", "paper")  # of the long skip connections, names in `dit.SKIPS`

# As those of `dit`.
RULES = (
    (r"\b(ins|mid|outs)/qkv/kernel$", "- * - tensor -"),
    (r"\b(ins|mid|outs)/qkv/bias$", "- - tensor -"),
    (r"\b(ins|mid|outs)/fc1/kernel$", "- * tensor"),
    (r"\b(ins|mid|outs)/fc1/bias$", "- tensor"),
    (r"\b(ins|mid|outs)/(proj|fc2)/kernel$", "- tensor *"),
    (r"\b(ins|mid|outs|merges)/", "- * ..."),
)


class Size(NamedTuple):
    """A published size. conv: whether a 3x3 convolution comes behind the last Linear."""

    depth: int
    width: int
    heads: int
    conv: bool


SIZES = {
    "S": Size(12, 512, 8, conv=True),
    "S_deep": Size(16, 512, 8, conv=True),
    "M": Size(16, 768, 12, conv=True),
    "L": Size(20, 1024, 16, conv=True),
    "H": Size(28, 1152, 16, conv=False),
}


def normed(norm: nnx.LayerNorm, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """LayerNorm with its parameters, in float32."""
    return dit.layer_norm(x, EPS) * norm.scale + norm.bias


class Block(nnx.Module):
    """A transformer block with LayerNorm before attention and MLP. Nothing modulates it."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, dtype, attention: str = "xla", *, rngs: Keys
    ):
        hidden, linear = int(width * mlp_ratio), partial(nnx.Linear, dtype=dtype, kernel_init=KERNEL, rngs=rngs)
        self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        shape = (3, heads, width // heads)
        self.qkv = nnx.LinearGeneral(width, shape, use_bias=qkv_bias, dtype=dtype, kernel_init=KERNEL, rngs=rngs)
        self.proj = linear(width, width)
        self.fc1 = linear(width, hidden)
        self.fc2 = linear(hidden, width)
        self.dtype, self.attention = dtype, attention

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        qkv = checkpoint_name(self.qkv(normed(self.norm1, x).astype(self.dtype)), "qkv")
        out = attend(*jnp.moveaxis(qkv, 2, 0), self.attention)
        x = x + checkpoint_name(self.proj(out.reshape(x.shape)), "proj").astype(x.dtype)
        hidden = checkpoint_name(self.fc1(normed(self.norm2, x).astype(self.dtype)), "fc1")
        x = x + checkpoint_name(self.fc2(jax.nn.gelu(hidden, approximate=False)), "fc2").astype(x.dtype)
        return sharding.kept_over_batch(x)


class TimePerceptron(Perceptron):
    """Linear to 4 widths, SiLU, Linear, in float32."""

    def __init__(self, width: int, *, rngs: Keys):
        linear = partial(nnx.Linear, precision="highest", kernel_init=KERNEL, rngs=rngs)
        self.fc1, self.fc2 = linear(width, 4 * width), linear(4 * width, width)


def sinusoids(t: Float[Array, " b"], width: int) -> Float[Array, "b k"]:
    """The cosines, then the sines, of t times width / 2 frequencies, from 1 down to almost 1 / 10000.

    Their logarithms are rounded to float32 as in torch: at t = 1000 one rounding of a frequency moves an angle by 6e-5.
    """
    half = width // 2
    logs = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angles = t.astype(jnp.float32)[:, None] * np.exp(logs.astype(np.float64)).astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class UViT(nnx.Module):
    """(x_t, t, y) -> (prediction, features of the patches); see `make` for the options.

    classes: of labels; 0 for no label, None for text. text: (tokens, width) of its features, None without.
    block, merge: build one Block and one Merge from `rngs`.
    """

    def __init__(
        self,
        patches: Patches,
        classes: int | None,
        text: tuple[int, int] | None,
        half: int,
        width: int,
        conv: bool,
        time_mlp: bool,
        block: Callable[..., Block],
        merge: Callable[..., Merge],
        stack: Stack,
        dtype,
        stream_dtype,
        *,
        rngs: Keys,
    ):
        axes, channels = len(patches.sides), patches.shape[-1]
        numbers = math.prod(patches.sides) * channels
        linear = partial(nnx.Linear, dtype=dtype, kernel_init=KERNEL, rngs=rngs)
        torch = dit.linear_of("torch", dtype, rngs)  # the first and the last layer are convolutions in U-ViT's code
        extras = 1 + bool(classes) + (text[0] if text else 0)
        self.patch_embed = torch(numbers, width)
        self.time_embed = TimePerceptron(width, rngs=rngs) if time_mlp else None
        labels = partial(nnx.Embed, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.label_embed = labels(classes + 1, width) if classes else None
        self.text_embed = linear(text[1], width) if text else None
        self.positions = nnx.Param(KERNEL(rngs.params(), (extras + math.prod(patches.grid), width)))
        self.ins = stacked(lambda rngs: block(rngs=rngs), half, rngs)
        self.mid = stacked(lambda rngs: block(rngs=rngs), 1, rngs)
        self.outs = stacked(lambda rngs: block(rngs=rngs), half, rngs)
        self.merges = stacked(lambda rngs: merge(rngs=rngs), half, rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.final = linear(width, numbers)
        self.conv = Conv(axes, channels, rngs=rngs) if conv else None
        self.patches, self.text, self.half, self.extras = patches, text, half, extras
        self.stack, self.dtype, self.stream_dtype = stack, dtype, stream_dtype

    def __call__(
        self, x_t: Float[Array, "b *s c"], t: Float[Array, " b"], y: Condition
    ) -> tuple[Float[Array, "b *s c"], tuple[Float[Array, "b n d"], ...]]:
        self._check(x_t, y)
        h = self._embed(x_t, t, y)

        def plain(h: Array, layer: tuple[Block]):
            (block,) = layer
            h = block(h)
            return h, h

        def merged(h: Array, layer: tuple[Block, Merge, Array]):
            block, merge, skip = layer
            h = block(merge(h, skip))
            return h, h

        run, features = self.stack.run, [h]
        h, outputs, ins = run(plain, h, (self.ins,), 0)
        skips, outputs = self.stack.reverse(ins, outputs)
        features += outputs
        h, outputs, _ = run(plain, h, (self.mid,), self.half)
        features += outputs
        h, outputs, _ = run(merged, h, (self.outs, self.merges, skips), self.half + 1)
        features += outputs
        return self._output(h[:, self.extras :]), tuple(feature[:, self.extras :] for feature in features)

    def _check(self, x_t: Array, y: Condition) -> None:
        """Raise ValueError for an example or a condition of another shape."""
        if x_t.shape[1:] != (shape := self.patches.shape):
            raise ValueError(f"the network takes examples of shape {shape}, given {x_t.shape[1:]}")
        if self.text and y["context"].shape[1:] != self.text:
            raise ValueError(f"the network takes text features of shape {self.text}, given {y['context'].shape[1:]}")

    def _embed(self, x_t: Float[Array, "b *s c"], t: Float[Array, " b"], y: Condition) -> Float[Array, "b m d"]:
        """The tokens with their positions: label, time, patches; or time, text, patches."""
        patches = self.patch_embed(patchify(x_t, self.patches.sides).astype(self.dtype))
        time = sinusoids(t, patches.shape[-1])
        tokens = [(time if self.time_embed is None else self.time_embed(time))[:, None]]
        if self.label_embed is not None:
            tokens.insert(0, self.label_embed(y)[:, None])
        if self.text:
            tokens.append(self.text_embed(y["context"].astype(self.dtype)))
        h = jnp.concatenate([token.astype(jnp.float32) for token in (*tokens, patches)], axis=1) + self.positions
        return sharding.kept_over_batch(h.astype(self.stream_dtype))

    def _output(self, h: Float[Array, "b n d"]) -> Float[Array, "b *s c"]:
        """The prediction: LayerNorm, a Linear, patches put together, the convolution."""
        out = self.final(normed(self.norm, h).astype(self.dtype)).astype(jnp.float32)
        out = unpatchify(out, self.patches.shape, self.patches.sides)
        return out if self.conv is None else self.conv(out)


class Conv(nnx.Conv):
    """A convolution over 3 elements of each of `axes` spatial axes, in float32, with torch's default initialisation."""

    def __init__(self, axes: int, channels: int, *, rngs: Keys):
        bias = partial(dit.symmetric, bound=(3**axes * channels) ** -0.5)
        super().__init__(
            channels, channels, (3,) * axes, padding=1, kernel_init=KERNELS["torch"], bias_init=bias, rngs=rngs
        )


def make(
    space: Space,
    inputs: Mapping[str, tuple[int, ...]],
    read_blocks: tuple[int, ...] = (),
    *,
    size: str = "S",
    patch: int = 2,
    depth: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    conv: bool | None = None,
    time_mlp: bool = False,
    skip: str = "uvit",
    dtype: str = "float32",
    stream_dtype: str = "float32",
    remat: str = "named",
    attention: str = "auto",
    unroll: bool | None = None,
) -> Model:
    """A U-ViT for examples of `space`, whose conditions are labels, nothing (no classes) or features of text.

    space: of text, a condition is {"context": [tokens, width]}. Other entries are for losses.
    read_blocks: blocks whose features losses read one at a time. Features are those of the patches alone.

    size: `S`, `S_deep`, `M`, `L` or `H`. depth, width, heads: replace single numbers of it. As in the paper, a depth of
        12 or 13 means 13 blocks: 6 on either side of the one in the middle.
    qkv_bias: whether queries, keys and values have a bias.
    conv: a convolution over 3 elements along each axis at the end. None: as the size has it.
    time_mlp: an MLP between the sinusoids of the time and their token.
    skip: how an out block takes the output of its partner. `uvit`: by a Linear over both. `paper`: by DiverseDiT's form
        (Eq. 8), with a LayerNorm before the Linear, which no published network has. DiverseDiT connects the same pairs
        of blocks: it adds no connections of its own, and its other forms are refused.

    Its times are large: objective flow_matching needs time_scale = 999.0, and ddpm gives the steps.

    The other options: `models.dit.make`.
    """
    check_inputs("uvit", inputs, ())
    dit.check_options(dtype, stream_dtype)
    form = SKIPS[one_of("model.skip", skip, FORMS)]
    changes = {"depth": depth, "width": width, "heads": heads, "conv": conv}
    dims = SIZES[one_of("model.size", size, SIZES)]
    dims = dims._replace(**{name: value for name, value in changes.items() if value is not None})
    depth, width, heads, conv = dims
    dit.check_dimensions(dit.Size(depth, width, heads))
    if width % 2:
        raise ConfigError(f"model.width = {width}: the sinusoids of the time need an even number")
    in_range("model.mlp_ratio", mlp_ratio, 1 / width, MANY / width)
    patches, half = patches_of(space, patch, positions="axes"), depth // 2
    grid = patches.grid
    classes, text = space.conditions.classes, text_of(space.conditions)
    tokens = math.prod(grid) + 1 + bool(classes) + (text[0] if text else 0)
    kernel = choose(attention, dtype, tokens=tokens, width=width // heads)
    stack = dit.stack_of(read_blocks, 2 * half + 1, remat, unroll)
    block = partial(Block, width, heads, mlp_ratio, qkv_bias, jnp.dtype(dtype), kernel)
    merge = dit.merging(form, width, jnp.dtype(dtype))
    options = (half, width, conv, time_mlp, block, merge, stack, jnp.dtype(dtype), jnp.dtype(stream_dtype))
    build = partial(UViT, patches, classes, text, *options)
    model = functional(lambda rngs: build(rngs=rngs))
    return model._replace(blocks=blocks, rules=RULES, skips=dit.skips(2 * half + 1), grid=grid, adapted=adapted)


def text_of(conditions: Conditions) -> tuple[int, int] | None:
    """(tokens, width) of the text features of a condition; None if it is a label."""
    if conditions.classes is not None:
        return None
    null = conditions.null
    if not isinstance(null, Mapping) or len(np.shape(null.get("context"))) != 2:
        raise ConfigError(
            "model uvit takes labels or features of text, and the conditions of these data are others: captions need "
            "config.text_encoder"
        )
    return tuple(null["context"].shape)


def blocks(params: Params) -> list[Params]:
    """The parameters of each block, in order."""
    return [block for stack in ("ins", "mid", "outs") for block in each(params[stack])]


def adapted(was: Made, now: Made) -> tuple[Params, list[str]]:
    """The parameters of a U-ViT, changed to fit another one with other classes, another grid or other patches.

    See `api.Model`.
    """
    adapt.check_name(was, now)
    if was.space.kind != now.space.kind:
        raise ConfigError(f"its network makes {was.space.kind}, that of this run {now.space.kind}")
    params, told = adapt.new_labels(was, now, was.params)
    old, new = (adapt.grid(made) for made in (was, now))
    if old != new and "positions" in params:
        extras = len(params["positions"]) - math.prod(old)
        table = adapt.resized_table(params["positions"][extras:], old, new)
        params = {**params, "positions": np.concatenate([params["positions"][:extras], table])}
        told.append(f"its learned positions are resized from {adapt.by(old)} patches to {adapt.by(new)}")
    sides = [adapt.patch_sides(made) for made in (was, now)]
    params, resized = adapt.new_patches(params, *sides, was.space.shape[-1])
    if resized and "conv" in params:
        resized = [f"{resized[0]}; its last convolution still reaches one element, so what it gives changes at edges"]
    return params, told + resized
