"""Latents of a variational autoencoder: images to moments, moments to latents, latents to images.

`tools/prepare_latents.py` stores the moments of every image once. Training draws new latents from them at each step.
The frames of a video [f H W k] are images: each is encoded and decoded alone, and its noise is its own.
Latent diffusion (arXiv 2112.10752) scales its latents by 0.18215, to about unit variance.
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from diversedit_jax import sharding
from diversedit_jax.api import Batch, Codec, Params
from diversedit_jax.codecs import pixels
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import PRECISIONS
from diversedit_jax.models.vae import VAE, network
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.weights.vae import open_vae


def by_frame(function: Callable[[Array], Array], x: Float[Array, "b *f h w c"] | UInt8[Array, "b *f h w c"]) -> Array:
    """`function` of images [n h w c], for images or for the frames of videos [b f h w c]."""
    found = function(x.reshape(-1, *x.shape[-3:]))
    return found.reshape(*x.shape[:-3], *found.shape[1:])


def moments(vae: VAE, params: Params, images: UInt8[Array, "b H W k"]) -> Float[Array, "b h w c2"]:
    """The moments of images: c means, then c standard deviations, before scaling."""
    return vae.encode(params, images.astype(jnp.float32) / 127.5 - 1)


def draw(key: Array, moments: Float[Array, "b *s c2"], scale: float, bias: float) -> Float32[Array, "b *s c"]:
    """(mean + std * noise - bias) * scale, with mean and std from `moments`. Frames have independent noise."""
    mean, std = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return (mean + std * jax.random.normal(key, mean.shape) - bias) * scale


def mean_encoder(vae: str, scale: float, bias: float, precision: str = "highest", chunk: int = 8) -> Callable:
    """A function of uint8 images [b H W k] that gives the means of their latents, scaled: x [b h w c]. See `make`.

    Videos [b f H W k] give x [b f h w c].
    """
    release = open_vae(vae)
    params, encoder = release.read(("encoder",)), network(release.arch, precision)

    def latents(images: UInt8[Array, "n H W k"]) -> Float[Array, "n h w c"]:
        return (jnp.split(moments(encoder, params, images), 2, axis=-1)[0] - bias) * scale

    return jax.jit(lambda images: by_frame(lambda frames: sharding.in_chunks(latents, frames, chunk, 1), images))


def make(
    *,
    scale: float = 0.18215,
    bias: float = 0.0,
    vae: str | None = None,
    precision: str = "highest",
    rounding: str = pixels.ROUNDING,
    chunk: int = 8,
) -> Codec:
    """The codec from `moments` [b h w 2c] to `x` float32 [b h w c], or of videos from [b f h w 2c] to [b f h w c].

    scale, bias: x = (latent - bias) * scale, by default as in latent diffusion, DiT and SiT.
    vae: the autoencoder that made the latents, a folder or file for `weights.vae.open_vae`. Its decoder turns samples
        into images. None: samples stay latents.
    precision: of the decoder's products, see `models.vae`.
    rounding: of images to 256 levels, see `codecs.pixels`.
    chunk: the number of images or frames that a device decodes at a time. Each needs 224 MiB of activations at
        256 x 256 pixels (as XLA plans it on a CPU).
    """
    in_range("codec.scale", scale, above=0)
    in_range("codec.chunk", chunk, 1)
    one_of("codec.precision", precision, PRECISIONS)
    one_of("codec.rounding", rounding, pixels.ROUNDINGS)

    def encode(frozen: Params, batch: Batch, key: Array) -> Batch:
        def widened(x: Array) -> Array:  # cached features may be stored in half precision
            return x.astype(jnp.float32) if x.dtype == jnp.float16 else x

        others = {name: value for name, value in batch.items() if name != "moments"}
        return {"x": draw(key, batch["moments"], scale, bias), **jax.tree.map(widened, others)}

    if vae is None:
        return Codec(dict, encode, decode=None, reads=("moments",))
    release = open_vae(vae)
    for option, given, wanted in (("scale", scale, release.scale), ("bias", bias, release.shift)):
        if wanted not in (None, given):
            raise ConfigError(
                f"codec.{option} = {given}, but the autoencoder {vae} was trained with {wanted}, as its config.json "
                "says; a file of weights without one takes any"
            )
    decoder = network(release.arch, precision)

    def decode(frozen: Params, x: Float[Array, "b *f h w c"]) -> UInt8[Array, "b *f H W k"]:
        def images(part: Float[Array, "n h w c"]) -> UInt8[Array, "n H W k"]:
            return pixels.decode({}, decoder.decode(frozen, part / scale + bias), rounding)

        return by_frame(lambda frames: sharding.in_chunks(images, frames, chunk), x)

    return Codec(cache(lambda: release.read(("decoder",))), encode, decode, reads=("moments",))
