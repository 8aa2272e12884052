"""The frozen text encoder of CLIP (arXiv 2103.00020): token ids to features of each token, and of the whole text.

There is no padding mask: tokens behind the end are ordinary tokens, as text-to-image models read them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Keys, Model, functional, vit
from diversedit_jax.models.stack import stacked
from diversedit_jax.registry import one_of

LARGEST_ID = 2  # an `end` that published configs have by mistake: their end token is the one with the largest id


class Architecture(NamedTuple):
    """Everything that distinguishes one text encoder from another.

    hidden: width inside of the MLP. places: the most tokens of a text. end: id of the end token, or LARGEST_ID.
    projection: width of the projected text; 0: the file has no projection.
    """

    depth: int
    width: int
    heads: int
    hidden: int
    vocabulary: int
    places: int
    projection: int
    end: int = LARGEST_ID
    activation: str = "quick_gelu"
    eps: float = 1e-5


class Text(NamedTuple):
    """Texts as features. tokens: after the last norm. pooled: that of the end token. projected: `pooled`, projected."""

    tokens: Float[Array, "b n d"]
    pooled: Float[Array, "b d"]
    projected: Float[Array, "b k"] | None


def end_of(ids: Int[Array, "b n"], end: int) -> Int[Array, " b"]:
    """The place of the first end token of each text. end: as in `Architecture`."""
    return ids.argmax(axis=1) if end == LARGEST_ID else (ids == end).argmax(axis=1)


class Block(vit.Block):
    """A block whose tokens see themselves and those before."""

    def _attention(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        q, k, v = jnp.moveaxis(self.qkv(x.astype(self.dtype)), 2, 0)
        seen = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # its softmax is float32
        return self.proj(seen.reshape(x.shape))


class TextEncoder(nnx.Module):
    """Token ids [b n] -> Text."""

    def __init__(self, arch: Architecture, dtype, *, rngs: Keys):
        def table(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))

        self.token_embed, self.position = table(arch.vocabulary, arch.width), table(arch.places, arch.width)
        sizes = {"depth": arch.depth, "width": arch.width, "heads": arch.heads, "hidden": arch.hidden}
        kind = {"activation": arch.activation, "eps": arch.eps}
        like = vit.Architecture(**sizes, **kind, patch=1, channels=1, side=1)  # of the blocks alone
        self.blocks = stacked(lambda rngs: Block(like, dtype, rngs=rngs), arch.depth, rngs)
        self.norm = nnx.LayerNorm(arch.width, epsilon=arch.eps, dtype=jnp.float32, rngs=rngs)
        linear = partial(nnx.Linear, use_bias=False, dtype=jnp.float32, rngs=rngs)
        self.projection = linear(arch.width, arch.projection) if arch.projection else None
        self.arch = arch

    def __call__(self, ids: Int[Array, "b n"]) -> Text:
        count = ids.shape[1]
        if count > self.arch.places:
            raise ConfigError(f"a text has {count} tokens, the encoder takes at most {self.arch.places}")
        x = self.token_embed[...][ids] + self.position[:count]
        x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
        tokens = self.norm(x)
        last = end_of(ids, self.arch.end)
        pooled = jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]
        return Text(tokens, pooled, None if self.projection is None else self.projection(pooled))


def network(arch: Architecture, dtype: str = "float32") -> Model:
    """The encoder as pure functions: init: key -> random params; apply: (params, ids [b n]) -> Text.

    dtype: of the blocks' matmuls and their weights, `float32` or `bfloat16`. All else is float32.
    """
    one_of("text encoder: dtype", dtype, ("float32", "bfloat16"))
    one_of("text encoder: activation", arch.activation, vit.ACTIVATIONS)
    if arch.width % arch.heads:
        raise ConfigError(f"text encoder: heads = {arch.heads} does not divide the width {arch.width}")
    return functional(lambda rngs: TextEncoder(arch, jnp.dtype(dtype), rngs=rngs))
