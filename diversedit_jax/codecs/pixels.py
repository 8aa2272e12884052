"""Pixels as they are: the network's space is the image itself, with values in [-1, 1]."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from diversedit_jax.api import Batch, Codec, Params
from diversedit_jax.registry import one_of

# What is added to 127.5 x before the fraction is dropped. `nearest`: DiT, SiT and MeanFlow. `floor`: ADM, REPA and
# DiverseDiT; it is darker by half a level on average. Scores of the two do not compare.
ROUNDINGS = {"nearest": 128.0, "floor": 127.5}
ROUNDING = "nearest"


def encode(frozen: Params, batch: Batch, key: Array) -> Batch:
    """The batch as it is, and x as uint8 `image` for encoders. Where none reads it, it is not computed."""
    return {"image": decode(frozen, batch["x"]), **batch}


def decode(frozen: Params, x: Float[Array, "b *s c"], rounding: str = ROUNDING) -> UInt8[Array, "b *s c"]:
    """x as levels: 127.5 x + 128 (or 127.5, see ROUNDINGS), clipped to 0 .. 255, without its fraction."""
    return jnp.clip(127.5 * x.astype(jnp.float32) + ROUNDINGS[rounding], 0, 255).astype(jnp.uint8)


def make(*, rounding: str = ROUNDING) -> Codec:
    """The codec that leaves everything as it is. rounding: of samples to 256 levels, one of ROUNDINGS."""
    one_of("rounding", rounding, ROUNDINGS)
    return Codec(dict, encode, partial(decode, rounding=rounding))
