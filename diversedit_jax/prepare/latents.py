"""Latents of a variational autoencoder, drawn anew at each step from stored moments.

Latent diffusion (arXiv 2112.10752) scales the latents of its autoencoder to about unit variance by 0.18215.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from diversedit_jax.api import Batch, Params, Prepare
from diversedit_jax.errors import ConfigError


def draw(key: Array, moments: Float[Array, "b h w c2"], scale: float, bias: float) -> Float32[Array, "b h w c"]:
    """(mean + std * noise - bias) * scale; the last axis of `moments` holds c means, then c standard deviations."""
    mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return (mean + std * jax.random.normal(key, mean.shape) - bias) * scale


def _widened(x: Array) -> Array:
    """What is stored in half precision, cached features, in float32."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def make(*, scale: float = 0.18215, bias: float = 0.0) -> Prepare:
    """Batches with `moments` [b h w 2c] become batches with `x` float32 [b h w c]; all else in them is passed on.

    scale, bias: x = (latent - bias) * scale, by default as in latent diffusion, DiT and SiT. There is no decoder yet.
    """
    if not scale > 0:
        raise ConfigError(f"latents: scale must be positive, given {scale}")

    def apply(frozen: Params, batch: Batch, key: Array) -> Batch:
        others = {name: value for name, value in batch.items() if name != "moments"}
        return {"x": draw(key, batch["moments"], scale, bias), **jax.tree.map(_widened, others)}

    return Prepare(dict, apply, decode=None)
