"""The variational autoencoder of Stable Diffusion (AutoencoderKL; arXiv 2112.10752), between images and latents.

Arithmetic is float32. `precision` is that of its products: `highest` for latents that are stored and for samples that
are judged; on a TPU `default` multiplies in bfloat16, which is several times faster and changes the latents by about
1e-3. A CPU multiplies in float32 either way.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import PRECISIONS, functional
from diversedit_jax.registry import one_of

LOGVAR = (-30.0, 20.0)  # to which the log variance is clipped, as published


class Architecture(NamedTuple):
    """What distinguishes one autoencoder from another; by default that of Stable Diffusion 1 and 2.

    widths: of each level; between two levels the sides are halved. layers: residual blocks of a level of the encoder;
    the decoder has one more. groups: of all group norms. quant: 1 x 1 convolutions on both sides of the latents.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    quant: bool = True

    @property
    def factor(self) -> int:
        """Pixels of the image along a side of one latent."""
        return 2 ** (len(self.widths) - 1)


class Layers(NamedTuple):
    """How the layers of one network are made."""

    groups: int
    precision: str
    rngs: nnx.Rngs

    def conv(self, inputs: int, outputs: int, side: int = 3, **options) -> nnx.Conv:
        """A convolution by side x side."""
        return nnx.Conv(inputs, outputs, (side, side), precision=self.precision, rngs=self.rngs, **options)

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        """A product over the channels."""
        return nnx.Linear(inputs, outputs, precision=self.precision, rngs=self.rngs)

    def norm(self, width: int) -> nnx.GroupNorm:
        """A group norm; its variance is not taken as a difference of large numbers."""
        if width % self.groups:
            raise ConfigError(f"vae: groups = {self.groups} does not divide the width {width}")
        return nnx.GroupNorm(width, self.groups, epsilon=1e-6, use_fast_variance=False, rngs=self.rngs)


class Residual(nnx.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, width: int, layers: Layers):
        self.norm1, self.conv1 = layers.norm(inputs), layers.conv(inputs, width)
        self.norm2, self.conv2 = layers.norm(width), layers.conv(width, width)
        self.shortcut = layers.linear(inputs, width) if inputs != width else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Attention of every place to every place, with one head. It holds (h w)^2 numbers for each image."""

    def __init__(self, width: int, layers: Layers):
        self.norm = layers.norm(width)
        self.q, self.k, self.v, self.out = (layers.linear(width, width) for _ in range(4))
        self.precision = layers.precision

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        places = self.norm(x).reshape(len(x), -1, x.shape[-1])
        q, k, v = self.q(places), self.k(places), self.v(places)
        einsum = partial(jnp.einsum, precision=self.precision)
        weights = jax.nn.softmax(einsum("bnd,bmd->bnm", q, k) * x.shape[-1] ** -0.5, axis=-1)
        return x + self.out(einsum("bnm,bmd->bnd", weights, v)).reshape(x.shape)


class Middle(nnx.Module):
    """What stands between the levels and the latents: residual, attention, residual."""

    def __init__(self, width: int, layers: Layers):
        self.first, self.second = (Residual(width, width, layers) for _ in range(2))
        self.attention = Attention(width, layers)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.second(self.attention(self.first(x)))


class Level(nnx.Module):
    """Residual blocks at one resolution; `resize` is the convolution of the change to the next, None at the last."""

    def __init__(self, inputs: int, width: int, count: int, resize: nnx.Conv | None, layers: Layers):
        self.residuals = nnx.List([Residual(inputs if i == 0 else width, width, layers) for i in range(count)])
        self.resize = resize

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        for residual in self.residuals:
            x = residual(x)
        return x


class Encoder(nnx.Module):
    """Images in [-1, 1] -> the means and standard deviations of their latents, [b h w 2k], before scaling."""

    def __init__(self, arch: Architecture, layers: Layers):
        *_, last = arch.widths
        # Halved by a stride over pixels that are padded to the right and below alone, as published.
        halving = {"strides": 2, "padding": ((0, 1), (0, 1))}
        self.conv_in = layers.conv(arch.channels, arch.widths[0])
        self.levels = nnx.List(
            [
                Level(before, width, arch.layers, layers.conv(width, width, **halving) if more else None, layers)
                for before, width, more in levels(arch.widths)
            ]
        )
        self.middle = Middle(last, layers)
        self.norm, self.conv_out = layers.norm(last), layers.conv(last, 2 * arch.latent_channels)
        self.quant = layers.linear(2 * arch.latent_channels, 2 * arch.latent_channels) if arch.quant else None
        self.arch = arch

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w k2"]:
        _check_images(self.arch, images)
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
            x = x if level.resize is None else level.resize(x)
        x = self.conv_out(jax.nn.silu(self.norm(self.middle(x))))
        x = x if self.quant is None else self.quant(x)
        mean, logvar = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR))], axis=-1)


class Decoder(nnx.Module):
    """Latents before scaling -> images, about [-1, 1] and not clipped."""

    def __init__(self, arch: Architecture, layers: Layers):
        widths = arch.widths[::-1]
        k = arch.latent_channels
        self.quant = layers.linear(k, k) if arch.quant else None
        self.conv_in = layers.conv(k, widths[0])
        self.middle = Middle(widths[0], layers)
        self.levels = nnx.List(
            [
                Level(before, width, arch.layers + 1, layers.conv(width, width) if more else None, layers)
                for before, width, more in levels(widths)
            ]
        )
        self.norm, self.conv_out = layers.norm(widths[-1]), layers.conv(widths[-1], arch.channels)

    def __call__(self, latents: Float[Array, "b h w k"]) -> Float[Array, "b H W c"]:
        x = self.middle(self.conv_in(latents if self.quant is None else self.quant(latents)))
        for level in self.levels:
            x = level(x)
            x = x if level.resize is None else level.resize(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return self.conv_out(jax.nn.silu(self.norm(x)))


def levels(widths: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """Of each level: the width before it, its own, and whether another one follows."""
    return [(widths[max(i - 1, 0)], width, i + 1 < len(widths)) for i, width in enumerate(widths)]


def _check_images(arch: Architecture, images: Array) -> None:
    _, height, width, channels = images.shape
    if channels != arch.channels or height % arch.factor or width % arch.factor:
        raise ConfigError(
            f"vae: images of {height} x {width} pixels and {channels} channels: wanted {arch.channels} channels and "
            f"sides that {arch.factor} divides"
        )


class VAE(NamedTuple):
    """The autoencoder as pure functions over nested dicts of arrays.

    init:   key -> {"encoder": params, "decoder": params}.
    encode: (params, images [b H W c] in [-1, 1]) -> moments float32 [b h w 2k]: k means, then k standard deviations.
    decode: (params, latents [b h w k]) -> images float32 [b H W c], about [-1, 1], not clipped.

    Latents are before scaling. Each function reads its own half of the parameters: the other may be missing.
    """

    init: Callable[[Array], Params]
    encode: Callable[[Params, Array], Array]
    decode: Callable[[Params, Array], Array]


@cache
def network(arch: Architecture, precision: str = "highest") -> VAE:
    """The autoencoder of an architecture; `precision` of its products: one of models.PRECISIONS, see above.

    Raises ConfigError for what is no autoencoder, or images that `encode` cannot take.
    """
    one_of("vae: precision", precision, PRECISIONS)
    sizes = (arch.channels, arch.latent_channels, arch.layers, arch.groups, len(arch.widths), *arch.widths)
    if min(sizes) < 1:
        raise ConfigError(f"vae: not an architecture: {arch}")
    encoder = functional(lambda rngs: Encoder(arch, Layers(arch.groups, precision, rngs)))
    decoder = functional(lambda rngs: Decoder(arch, Layers(arch.groups, precision, rngs)))

    def init(key: Array) -> Params:
        first, second = jax.random.split(key)
        return {"encoder": encoder.init(first), "decoder": decoder.init(second)}

    def encode(params: Params, images: Float[Array, "b H W c"]) -> Float[Array, "b h w k2"]:
        return encoder.apply(params["encoder"], images)

    def decode(params: Params, latents: Float[Array, "b h w k"]) -> Float[Array, "b H W c"]:
        return decoder.apply(params["decoder"], latents)

    return VAE(init, encode, decode)
