"""An image and its class token as one vector, so that every solver and guidance serve the pair as they serve an image
(REG, arXiv 2507.01467).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from diversedit_jax.api import Network


def pack(image: Float[Array, "b h w c"], token: Float[Array, "b k"]) -> Float[Array, "b 1 1 m"]:
    """The pair as an image of one pixel with m = h w c + k channels."""
    return jnp.concatenate([image.reshape(len(image), -1), token], axis=1)[:, None, None]


def unpack(
    x: Float[Array, "b 1 1 m"], shape: tuple[int, int, int]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """The image of `shape` (h, w, c) and the token: the inverse of `pack`."""
    image, token = jnp.split(x[:, 0, 0], [math.prod(shape)], axis=1)
    return image.reshape(-1, *shape), token


def packed(network: Network, shape: tuple[int, int, int]) -> Network:
    """A network of pairs, image and token, as a network of packed ones."""

    def apply(x, t, y):
        image, token = unpack(x, shape)
        prediction, features = network(image, t, y, token=token)
        return pack(*prediction), features

    return apply


def scales(
    shape: tuple[int, int, int], token_width: int, image: float, token: float, channels: int | None = None
) -> Float32[np.ndarray, " m"]:
    """The guidance scale of each channel of a packed pair: `image`, then `token`.

    channels: of the image, guide the first so many only; the others get scale 1, which changes nothing.
    """
    per_channel = np.where(np.arange(shape[-1]) < (channels or shape[-1]), image, 1.0)
    return np.append(np.broadcast_to(per_channel, shape), np.full(token_width, token)).astype(np.float32)
