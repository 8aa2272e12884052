"""What several losses share: heads (linear layers with SiLU between them), unit vectors, groups of a batch.

The losses run in other people's programs, so they spell out every broadcast and every change of type: JAX can be set to
refuse those that are implied.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from diversedit_jax.api import Params
from diversedit_jax.shapes import Array, Bool, Float, PRNGKeyArray

DTYPES = ("float32", "bfloat16", "float16")  # of matmuls
EPS = 1e-12  # the smallest length that is divided by, torch's default
xavier = jax.nn.initializers.xavier_uniform()


def init_head(key: PRNGKeyArray, widths: Sequence[int]) -> Params:
    """Parameters of the layers widths[0] -> widths[1] -> ...: kernels [in, out], Xavier-uniform, and biases, zero."""
    sizes = list(pairwise(widths))
    return {
        f"fc{i}": {"kernel": xavier(layer_key, size), "bias": jnp.zeros(size[1])}
        for i, (layer_key, size) in enumerate(zip(jax.random.split(key, len(sizes)), sizes, strict=True), 1)
    }


def head(params: Params, x: Float[Array, "*b d"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*b k"]:
    """The output of the layers in float32. Matmuls are in `dtype`."""
    for i in range(1, len(params) + 1):
        layer = params[f"fc{i}"]
        x = jax.nn.silu(x) if i > 1 else x
        x = x.astype(dtype) @ layer["kernel"].astype(dtype)
        x = x + jnp.broadcast_to(layer["bias"].astype(dtype), x.shape)
    return x.astype(jnp.float32)


def wide(x: ArrayLike) -> Array:
    """An array in float32; float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def unit(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """The vectors along an axis at length 1, in at least float32. A zero vector stays zero and gets no gradient."""
    x = wide(x)
    squares = jnp.sum(x * x, axis=axis, keepdims=True)
    return x * jnp.where(squares > EPS**2, jax.lax.rsqrt(jnp.maximum(squares, EPS**2)), 0)


def in_groups(x: Float[Array, "b ..."] | Bool[Array, "b ..."], groups: int) -> Array:
    """A batch as `groups` equal parts, in their order: [g b_g ...]."""
    if groups < 1 or len(x) % groups:
        raise ValueError(f"groups = {groups} must divide the batch of {len(x)}")
    return x.reshape(groups, -1, *x.shape[1:])
