"""Pixels as they are: the network's space is the image itself, with values in [-1, 1]."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from diversedit_jax.api import Batch, Params, Prepare


def apply(frozen: Params, batch: Batch, key: Array) -> Batch:
    """The batch as it is, and `x` [b h w c] as uint8 `image` for encoders; where none reads it, it is not computed."""
    return {"image": decode(frozen, batch["x"]), **batch}


def decode(frozen: Params, x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
    """The nearest of 256 grey levels; values outside [-1, 1] are clipped."""
    return jnp.clip(jnp.round((x.astype(jnp.float32) + 1) * 127.5), 0, 255).astype(jnp.uint8)


def make() -> Prepare:
    """The preparation that leaves everything as it is."""
    return Prepare(dict, apply, decode)
