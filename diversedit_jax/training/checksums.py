"""Checksums of arrays, computed where the arrays are."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


@jax.jit
def checksum(x: Array) -> UInt32[Array, ""]:
    """A hash of an array's bits, equal on every mesh: the sum modulo 2^32 of a hash of each word and its position.

    The hash (MurmurHash3's finalizer) is one-to-one in the word, so that any change of a single word shows. It is not
    linear, so that two flipped sign bits do not cancel as in a weighted sum.
    """
    bits = x.dtype.itemsize * 8
    word = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{min(bits, 32)}")
    word = word.astype(jnp.uint32)  # [... 2] for a 64-bit array: two words per element
    position, stride = jnp.uint32(0), 1
    for axis in reversed(range(word.ndim)):  # a reshape would gather a sharded array
        position += jax.lax.broadcasted_iota(jnp.uint32, word.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= word.shape[axis]
    word = word + position * jnp.uint32(0x9E3779B9)
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)


def checksums(arrays: Mapping[str, Array]) -> dict[str, int]:
    """The checksum of each array. They are computed one by one: side by side they can deadlock on several CPUs."""
    return {path: int(checksum(x)) for path, x in arrays.items()}
