"""MMDiT, the text-to-image transformer of Stable Diffusion 3 (arXiv 2403.03206) as REPA trains it (arXiv 2410.06940).

Image and text are two streams with weights of their own. They meet in the attention of each block. The long residual
connections and the losses of this package work on the image stream, as in `dit`.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diversedit_jax import sharding
from diversedit_jax.api import Conditions, Features, Made, Model, Params, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Keys, adapt, check_inputs, dit, functional
from diversedit_jax.models.attention import attend, choose
from diversedit_jax.models.dit import QK_NORMS, Block, Gate, Merge, Perceptron, Skip, TimeEmbedding
from diversedit_jax.models.patches import Patches, check_table, patches_of, patchify, position_table, unpatchify
from diversedit_jax.models.stack import Stack, each, part, stacked
from diversedit_jax.registry import MANY, in_range, one_of

INITS = ("adaln_zero", "torch")
STREAMS = ("image", "both")
TABLE = 16  # side of the position table: patches of a latent of 256 pixels
BLOCK = r"\b(shallow|deep)/(image|text)"
LAST = r"\blast/(image|text)"

# As those of `dit`, for both streams. The last block is no layer of a stack.
RULES = (
    (rf"{BLOCK}/qkv/kernel$", "- * - tensor -"),
    (rf"{BLOCK}/qkv/bias$", "- - tensor -"),
    (rf"{BLOCK}/fc1/kernel$", "- * tensor"),
    (rf"{BLOCK}/fc1/bias$", "- tensor"),
    (rf"{BLOCK}/(proj|fc2)/kernel$", "- tensor *"),
    (r"\b(shallow|deep|merges|text_merges)/", "- * ..."),
    (rf"{LAST}/qkv/kernel$", "* - tensor -"),
    (rf"{LAST}/qkv/bias$", "- tensor -"),
    (rf"{LAST}/fc1/kernel$", "* tensor"),
    (rf"{LAST}/fc1/bias$", "tensor"),
    (rf"{LAST}/(proj|fc2)/kernel$", "tensor *"),
)


class LastText(nnx.Module):
    """The text stream of the last block: it gives queries, keys and values, and ends."""

    def __init__(self, width: int, heads: int, qk_norm: str, dtype, init: str, *, rngs: Keys):
        linear = dit.linear_of(init, dtype, rngs)
        self.ada = linear(width, 2 * width, zero=True)
        self.qkv = linear(width, (3, heads, width // heads))
        self.q_norm, self.k_norm = (dit.qk_norm_of(qk_norm, width // heads, rngs) for _ in range(2))
        self.dtype = dtype

    def modulation(self, c: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        """Shift and scale."""
        return jnp.split(self.ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)

    heads = Block.heads

    def after(self, text: Float[Array, "b m d"], out: Array, ada: list[Array]) -> Float[Array, "b m d"]:
        """The text, unchanged: nothing reads it."""
        return text


class JointBlock(nnx.Module):
    """A block with adaLN in each stream, and one attention over the tokens of both."""

    def __init__(self, image: Block, text: Block | LastText):
        self.image, self.text = image, text

    def __call__(self, x: Float[Array, "b n d"], text: Float[Array, "b m d"], c: Float[Array, "b d"]):
        ada, ada_text = self.image.modulation(c), self.text.modulation(c)
        streams = zip(self.text.heads(text, ada_text), self.image.heads(x, ada), strict=True)
        out = attend(*(jnp.concatenate(both, axis=1) for both in streams), self.image.attention)
        m = text.shape[1]
        return self.image.after(x, out[:, m:], ada), self.text.after(text, out[:, :m], ada_text)


class MMDiT(nnx.Module):
    """(x_t, t, y) -> (prediction, Features); see `make` for the options.

    image, last_text: build one Block, and the text stream of the last block, from `rngs`. merge: one Merge or Gate.
    tokens, pooled: of a condition: (tokens, width) of its `context`, width of its `pooled` or None.
    """

    def __init__(
        self,
        patches: Patches,
        tokens: tuple[int, int],
        pooled: int | None,
        depth: int,
        width: int,
        registers: int,
        table: int,
        block: Callable[..., Block],
        last_text: Callable[..., LastText],
        merge: Callable[..., Merge | Gate] | None,
        skip: Skip | None,
        both: bool,
        capture: str,
        stack: Stack,
        init: str,
        dtype,
        stream_dtype,
        *,
        rngs: Keys,
    ):
        half = depth // 2
        numbers = math.prod(patches.sides)
        linear = dit.linear_of(init, dtype, rngs)

        def joint(rngs: Keys) -> JointBlock:
            return JointBlock(block(rngs=rngs), block(rngs=rngs))

        def merges(count: int) -> Merge | Gate | None:
            return stacked(lambda rngs: merge(rngs=rngs), count, rngs) if count else None

        self.patch_embed = linear(numbers * patches.shape[-1], width)
        self.text_embed = linear(tokens[1], width)
        self.time_embed = TimeEmbedding(width, init=init, rngs=rngs)
        self.pooled_embed = None if pooled is None else Perceptron(pooled, width, init, rngs=rngs)
        self.registers = nnx.Param(jax.random.normal(rngs.params(), (registers, width))) if registers else None
        self.shallow = stacked(joint, half, rngs)
        self.deep = stacked(joint, depth - half - 1, rngs) if depth > 2 else None
        self.last = JointBlock(block(rngs=rngs), last_text(rngs=rngs))
        self.merges = merges(half) if skip else None
        self.text_merges = merges(half - (skip.merge == "post")) if skip and both else None
        self.final_ada = linear(width, 2 * width, zero=True)
        self.final = linear(width, numbers * patches.shape[-1], zero=True)
        self.patches, self.depth = patches, depth
        self.tokens, self.pooled, self.table = tokens, pooled, table
        self.skip, self.capture, self.stack = skip, capture, stack
        self.dtype, self.stream_dtype = dtype, stream_dtype

    def __call__(
        self, x_t: Float[Array, "b *s c"], t: Float[Array, " b"], y: Mapping[str, Array]
    ) -> tuple[Float[Array, "b *s c"], Features]:
        self._check(x_t, y)
        streams = self._embed(x_t, y["context"])
        c = self.time_embed(t)
        c = c if self.pooled is None else c + self.pooled_embed(y["pooled"].astype(jnp.float32))

        def plain(streams: tuple[Array, Array], layer: tuple[JointBlock]):
            (block,) = layer
            streams = block(*streams, c)
            return streams, streams

        def merged(streams: tuple[Array, Array], layer: tuple):
            """A deep block with the streams of its partner, as in `dit.DiT`: image with image, text with text."""
            block, merges, skips = layer

            def with_skips(streams: tuple[Array, Array]) -> tuple[Array, Array]:
                return tuple(
                    stream if merge is None else merge(stream, skip)
                    for stream, merge, skip in zip(streams, merges, skips, strict=True)
                )

            if self.skip.merge == "pre":
                streams = block(*with_skips(streams), c)
                return streams, streams
            before = block(*streams, c)
            streams = with_skips(before)
            return streams, before if self.capture == "block" else streams

        run, half, features = self.stack.run, self.depth // 2, [streams]
        streams, outputs, shallow = run(plain, streams, (self.shallow,), 0)
        if self.skip:
            skips, outputs = self.stack.reverse(shallow, outputs)
        first = outputs[0]
        features += outputs
        deep = self.depth - half - 1
        alone = self.depth % 2 if self.skip else deep  # deep blocks without a partner, before those with one
        if alone:
            streams, outputs, _ = run(plain, streams, (part(self.deep, 0, alone),), half)
            features += outputs
        if deep > alone:
            pairs = deep - alone  # the partner of the last block is the first
            layers = (part(self.deep, alone), self._merges(0, pairs), part(skips, 0, pairs))
            separate = self.skip.merge == "post" and self.capture == "block"
            streams, outputs, _ = run(merged, streams, layers, half + alone, separate)
            features += outputs
        body = merged if self.skip else plain
        body = body if self.stack.policy is None else jax.checkpoint(body, policy=self.stack.policy)
        layer = (self.last, self._last_merges(half - 1), first) if self.skip else (self.last,)
        streams, output = body(streams, layer)
        image, text = zip(*features, output, strict=True)
        registers = 0 if self.registers is None else len(self.registers)
        return self._output(streams[0], c), Features(image, [one[:, registers:] for one in text[:-1]])

    def _merges(self, begin: int, end: int) -> tuple[Any, Any]:
        """The connections of image and text for deep blocks begin .. end - 1 of those with a partner."""
        return part(self.merges, begin, end), part(self.text_merges, begin, end)

    def _last_merges(self, index: int) -> tuple[Any, Any]:
        """The connections of the last block. The `post` form has none for text: the block gives none."""
        text = self.text_merges if self.skip.merge == "pre" else None
        return each(self.merges)[index], text and each(text)[index]

    def _check(self, x_t: Array, y: Mapping[str, Array]) -> None:
        """Raise ValueError for an example or a condition of another shape."""
        if x_t.shape[1:] != (shape := self.patches.shape):
            raise ValueError(f"the network takes examples of shape {shape}, given {x_t.shape[1:]}")
        if y["context"].shape[2] != self.tokens[1]:
            raise ValueError(f"the network takes text features {self.tokens[1]} wide, given {y['context'].shape[1:]}")

    def _embed(self, x_t: Float[Array, "b *s c"], context: Float[Array, "b m k"]) -> tuple[Array, Array]:
        """The patches with their positions, and the text behind the registers. CLIP's features know their places."""
        x = self.patch_embed(patchify(x_t, self.patches.sides).astype(self.dtype)).astype(jnp.float32)
        x = x + positions(self.patches.grid, x.shape[-1], self.table)
        text = self.text_embed(context.astype(self.dtype))
        if self.registers is not None:
            registers = jnp.broadcast_to(self.registers.astype(text.dtype), (len(text), *self.registers.shape))
            text = jnp.concatenate([registers, text], axis=1)
        return tuple(sharding.kept_over_batch(stream.astype(self.stream_dtype)) for stream in (x, text))

    def _output(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b *s c"]:
        """The prediction: adaLN, a Linear, patches put together."""
        shift, scale = jnp.split(self.final_ada(jax.nn.silu(c)).astype(jnp.float32), 2, axis=-1)
        out = self.final(dit.modulate(x, shift, scale).astype(self.dtype)).astype(jnp.float32)
        return unpatchify(out, self.patches.shape, self.patches.sides)


def positions(grid: tuple[int, ...], width: int, side: int) -> np.ndarray:
    """The centre of the fixed table of `side` patches along each axis, [n d]: places of a grid of patches."""
    table = position_table((side,) * len(grid), width).reshape(*(side,) * len(grid), width)
    return table[tuple(slice((side - n) // 2, (side - n) // 2 + n) for n in grid)].reshape(-1, width)


def make(
    space: Space,
    inputs: Mapping[str, tuple[int, ...]],
    read_blocks: tuple[int, ...] = (),
    *,
    depth: int = 24,
    width: int = 768,
    heads: int = 24,
    patch: int = 2,
    mlp_ratio: float = 4.0,
    init: str = "adaln_zero",
    qk_norm: str = "none",
    registers: int = 0,
    table: int = TABLE,
    skip: str = "none",
    skip_init: str | None = None,
    skip_streams: str = "image",
    dtype: str = "float32",
    stream_dtype: str = "float32",
    remat: str = "named",
    capture: str = "merged",
    attention: str = "auto",
    unroll: bool | None = None,
) -> Model:
    """An MMDiT for examples of `space`, whose conditions are features of text; by default of the size of REPA's.

    space: a condition is {"context": [tokens, width]}. With "pooled" [width] besides, as in Stable Diffusion 3, it is
        added to the embedding of the time. Other entries are for losses.
    read_blocks: blocks whose features losses read one at a time.

    depth, width, heads: REPA's width is 32 and its number of heads 1 for each block.
    init: `adaln_zero`: blocks begin as the identity, as those of SiT. `torch`: torch's default everywhere, as REPA's
        code has it.
    qk_norm: of queries and keys: `none`, `layer` or `rms`.
    registers: learned tokens before the text.
    table: side, in patches, of the fixed position table. A smaller image takes its centre.
    skip_streams: which streams have long residual connections: `image`, or `both`. Then the last block, which gives no
        text, has none for text in the forms that merge behind a block.

    The other options: `models.dit.make`.
    """
    check_inputs("mmdit", inputs, ())
    one_of("model.init", init, INITS)
    one_of("model.qk_norm", qk_norm, QK_NORMS)
    one_of("model.skip_streams", skip_streams, STREAMS)
    dit.check_options(dtype, stream_dtype, capture)
    dit.check_dimensions(dit.Size(depth, width, heads))
    in_range("model.mlp_ratio", mlp_ratio, 1 / width, MANY / width)
    in_range("model.registers", registers, 0, MANY)
    patches = patches_of(space, patch, positions="axes")
    grid = patches.grid
    check_table(width, patches)
    in_range("model.table", table, max(grid), MANY)
    form = dit.skip_of(skip, skip_init)
    if skip_streams == "both" and form is None:
        raise ConfigError("model.skip_streams = 'both' has no effect while model.skip is 'none'")
    tokens, pooled = text_of(space.conditions)
    kernel = choose(attention, dtype, tokens=math.prod(grid) + tokens[0] + registers, width=width // heads)
    stack, compute = dit.stack_of(read_blocks, depth, remat, unroll), jnp.dtype(dtype)
    block = partial(Block, width, heads, mlp_ratio, qk_norm, compute, kernel, init)
    last_text = partial(LastText, width, heads, qk_norm, compute, init)
    merge = form and dit.merging(form, width, compute)
    dims = (patches, tokens, pooled, depth, width, registers, table)
    options = (form, skip_streams == "both", capture, stack, init, compute, jnp.dtype(stream_dtype))
    build = partial(MMDiT, *dims, block, last_text, merge, *options)
    model = functional(lambda rngs: build(rngs=rngs))
    fresh = ("merges", "text_merges")
    joined = form and dit.skips(depth)
    return model._replace(blocks=blocks, rules=RULES, fresh=fresh, skips=joined, grid=grid, adapted=adapted)


def text_of(conditions: Conditions) -> tuple[tuple[int, int], int | None]:
    """(tokens, width) of the text features of a condition, and the width of its pooled text, or None."""
    null = conditions.null
    if not isinstance(null, Mapping) or len(np.shape(null.get("context"))) != 2:
        given = "labels" if conditions.classes is not None else "others"
        raise ConfigError(
            f"model mmdit takes features of text, and the conditions of these data are {given}: give data with "
            "captions, and for their tokens config.text_encoder"
        )
    return tuple(null["context"].shape), null["pooled"].shape[0] if "pooled" in null else None


def blocks(params: Params) -> list[Params]:
    """The parameters of each block, in order."""
    return [*each(params["shallow"]), *(each(params["deep"]) if "deep" in params else ()), params["last"]]


def adapted(was: Made, now: Made) -> tuple[Params, list[str]]:
    """The parameters of an MMDiT for another one with the same arrays, see `api.Model`."""
    adapt.check_name(was, now)
    dit.check_merges(was, now)
    tables = [made.options["table"] for made in (was, now)]
    told = f"its position table has a side of {tables[0]}, that of this run {tables[1]}: positions are others"
    return was.params, ([told] if tables[0] != tables[1] else []) + dit.new_merges(was, now)
