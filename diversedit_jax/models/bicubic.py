"""Bicubic resizing as PyTorch defines it, by one small matrix per axis, for images and position tables.

`jax.image.resize` differs: without antialiasing its kernel has a = -0.5, where PyTorch has -0.75.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def kernel(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic kernel of Keys (1981): 1 at 0, 0 at other integers and beyond 2. a: its slope at 1."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(given: int, wanted: int, antialias: bool = False, scale: float | None = None) -> np.ndarray:
    """The matrix [wanted given] that resizes an axis. Its rows sum to 1. Pixel centres lie at halves.

    antialias: True: the kernel has a = -0.5, is widened by `scale` if that is above 1, and is cut at the edge.
        False: a = -0.75, and the edge pixel is repeated.
    scale: input pixels per output pixel; None: given / wanted. Coordinates are float32, as in PyTorch.
    """
    scale = np.float32(given / wanted if scale is None else scale)
    centre = scale * (np.arange(wanted, dtype=np.float32) + np.float32(0.5))
    if antialias:
        distance = (np.arange(given) + 0.5 - centre[:, None]) / max(scale, 1)
        matrix = kernel(distance, -0.5)
        return (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)
    taps = np.floor(centre - np.float32(0.5))[:, None] + np.arange(-1, 3)
    matrix = np.zeros((wanted, given))
    rows = np.broadcast_to(np.arange(wanted)[:, None], taps.shape)
    columns = np.clip(taps, 0, given - 1).astype(int)
    np.add.at(matrix, (rows, columns), kernel((centre - np.float32(0.5))[:, None] - taps, -0.75))
    return matrix.astype(np.float32)


def apply(rows: np.ndarray, columns: np.ndarray, x: Float[Array, "*b h w c"]) -> Float[Array, "*b height width c"]:
    """Resize h and w by the matrices `rows` [height h] and `columns` [width w], in float32."""
    x = jnp.einsum("Hh,...hwc->...Hwc", rows, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("Ww,...Hwc->...HWc", columns, x, precision=jax.lax.Precision.HIGHEST)


def resize(x: Float[Array, "*b h w c"], side: int) -> Float[Array, "*b side side c"]:
    """Resize images to side x side pixels without antialiasing, as torch's `interpolate(mode="bicubic")` does."""
    return apply(weights(x.shape[-3], side), weights(x.shape[-2], side), x)
