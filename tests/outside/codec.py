"""Between grey images [8 8 1] and x [4 4 4], whose channels are the four pixels of a patch."""

import jax.numpy as jnp

from diversedit_jax.api import Codec
from tests.outside import LEVELS, SHAPE


def make() -> Codec:
    """The codec. Conditions become float32; the mask stays."""

    def encode(frozen, batch, key):
        pixels = batch["pixels"].reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, *SHAPE)
        return {"x": (pixels.astype(jnp.float32) - frozen["middle"]) / LEVELS, "y": batch["y"]}

    def decode(frozen, x):
        pixels = x.reshape(-1, 4, 4, 2, 2).swapaxes(2, 3).reshape(-1, 8, 8, 1)
        return jnp.clip(jnp.round(pixels * LEVELS + frozen["middle"]), 0, 255).astype(jnp.uint8)

    def condition(frozen, stored):
        return stored | {"context": stored["context"].astype(jnp.float32)}

    return Codec(lambda: {"middle": jnp.float32(128)}, encode, decode, condition, lambda shape: SHAPE)
