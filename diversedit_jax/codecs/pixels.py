"""Pixels: the network's space is the image itself, with values in [-1, 1]."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from diversedit_jax.api import Batch, Codec, Params
from diversedit_jax.registry import one_of

# The number added to 127.5 x before the fraction is dropped. DiT, SiT and MeanFlow take `nearest`; ADM, REPA and
# DiverseDiT `floor`, which is darker by half a level on average. Their scores do not compare.
ROUNDINGS = {"nearest": 128.0, "floor": 127.5}
ROUNDING = "nearest"


def encode(frozen: Params, batch: Batch, key: Array) -> Batch:
    """Add x as uint8 `image`, for encoders. The compiler removes it if none reads it."""
    return {"image": decode(frozen, batch["x"]), **batch}


def decode(frozen: Params, x: Float[Array, "b *s c"], rounding: str = ROUNDING) -> UInt8[Array, "b *s c"]:
    """x as grey levels: 127.5 x + 128 (or 127.5, see ROUNDINGS), clipped to 0 .. 255, without the fraction."""
    return jnp.clip(127.5 * x.astype(jnp.float32) + ROUNDINGS[rounding], 0, 255).astype(jnp.uint8)


def make(*, rounding: str = ROUNDING) -> Codec:
    """The codec of pixels. rounding: of samples to 256 levels, one of ROUNDINGS."""
    one_of("rounding", rounding, ROUNDINGS)
    return Codec(dict, encode, partial(decode, rounding=rounding), reads=("x",))
