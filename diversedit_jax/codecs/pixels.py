"""Pixels as they are: the network's space is the image itself, with values in [-1, 1]."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from diversedit_jax.api import Batch, Codec, Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion

# From x in [-1, 1] to 0 .. 255, before the fraction is dropped. `nearest` of DiT, SiT and MeanFlow; `floor` of ADM,
# REPA and DiverseDiT, darker by half a level on average. Scores of the two do not compare.
ROUNDINGS = {"nearest": 128.0, "floor": 127.5}
ROUNDING = "nearest"


def encode(frozen: Params, batch: Batch, key: Array) -> Batch:
    """The batch as it is, and `x` [b h w c] as uint8 `image` for encoders; where none reads it, it is not computed."""
    return {"image": decode(frozen, batch["x"]), **batch}


def decode(frozen: Params, x: Float[Array, "b h w c"], rounding: str = ROUNDING) -> UInt8[Array, "b h w c"]:
    """x as levels: 127.5 x + 128 (or 127.5, see ROUNDINGS) clipped to 0 .. 255, without its fraction."""
    return jnp.clip(127.5 * x.astype(jnp.float32) + ROUNDINGS[rounding], 0, 255).astype(jnp.uint8)


def check(rounding: str) -> None:
    """Raise ConfigError for a rounding that is not known."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"unknown rounding {rounding!r}; {suggestion(rounding, ROUNDINGS)}")


def make(*, rounding: str = ROUNDING) -> Codec:
    """The preparation that leaves everything as it is. rounding: of samples to 256 levels, one of ROUNDINGS."""
    check(rounding)
    return Codec(dict, encode, partial(decode, rounding=rounding))
