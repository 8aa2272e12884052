"""Heads of auxiliary losses: linear layers with SiLU between them, as pure functions."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from diversedit_jax.api import Params

xavier = jax.nn.initializers.xavier_uniform()


def init(key: PRNGKeyArray, widths: Sequence[int]) -> Params:
    """Parameters of the layers widths[0] -> widths[1] -> ...: kernels [in, out], Xavier-uniform, and biases, zero."""
    sizes = list(pairwise(widths))
    keys = jax.random.split(key, len(sizes))
    return {
        f"fc{i}": {"kernel": xavier(keys[i - 1], size), "bias": jnp.zeros(size[1])} for i, size in enumerate(sizes, 1)
    }


def apply(params: Params, x: Float[Array, "*b d"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*b k"]:
    """The layers' output in float32; matmuls are in `dtype`."""
    for i in range(1, len(params) + 1):
        layer = params[f"fc{i}"]
        x = jax.nn.silu(x) if i > 1 else x
        x = x.astype(dtype) @ layer["kernel"].astype(dtype) + layer["bias"].astype(dtype)
    return x.astype(jnp.float32)
