"""Pixels as they are: the network's space is the image itself, with values in [-1, 1]."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from diversedit_jax.api import Batch, Params, Prepare


def apply(frozen: Params, batch: Batch, key: Array) -> Batch:
    """The batch as it is, and `x` [b h w c] as uint8 `image` for encoders; where none reads it, it is not computed."""
    return {"image": decode(frozen, batch["x"]), **batch}


def decode(frozen: Params, x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """The nearest of 256 grey levels, as DiT and SiT round: 127.5 x + 128 without its fraction, clipped to 0 .. 255."""
    return jnp.clip(127.5 * x.astype(jnp.float32) + 128, 0, 255).astype(jnp.uint8)


def make() -> Prepare:
    """The preparation that leaves everything as it is."""
    return Prepare(dict, apply, decode)
