"""An example and its class token packed into one vector, so that solvers and guidance serve the pair (REG, arXiv
2507.01467)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from diversedit_jax.api import Network
from diversedit_jax.diffusion.paths import Examples


def pack(x: Examples, token: Float[Array, "b k"]) -> Float[Array, "b m"]:
    """The numbers of x, then those of the token."""
    return jnp.concatenate([x.reshape(len(x), -1), token], axis=1)


def unpack(packed: Float[Array, "b m"], shape: tuple[int, ...]) -> tuple[Examples, Float[Array, "b k"]]:
    """x of `shape` (*s, c) and the token: the inverse of `pack`."""
    x, token = jnp.split(packed, [math.prod(shape)], axis=1)
    return x.reshape(-1, *shape), token


def packed(network: Network, shape: tuple[int, ...]) -> Network:
    """A network of packed pairs, from a network of x and token."""

    def apply(pair, t, y):
        x, token = unpack(pair, shape)
        prediction, features = network(x, t, y, token=token)
        return pack(*prediction), features

    return apply


def scales(
    shape: tuple[int, ...], token_width: int, scale: float, token_scale: float, channels: int | None = None
) -> Float32[np.ndarray, " m"]:
    """The guidance scale of each number of a packed pair: `scale` of x, `token_scale` of the token.

    channels: guide only the first channels of x, so many. The others get scale 1, which changes nothing.
    """
    per_channel = np.where(np.arange(shape[-1]) < (channels or shape[-1]), scale, 1.0)
    return np.append(np.broadcast_to(per_channel, shape), np.full(token_width, token_scale)).astype(np.float32)
