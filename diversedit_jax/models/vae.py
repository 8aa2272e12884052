"""The variational autoencoder of Stable Diffusion (AutoencoderKL; arXiv 2112.10752), between images and latents.

Arithmetic is float32. `precision` is that of matrix products: use `highest` for latents to store and samples to judge.
On a TPU, `default` multiplies in bfloat16: several times faster, with latents about 1e-3 off. A CPU always multiplies
in float32.
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
from diversedit_jax.models import PRECISIONS, Keys, functional
from diversedit_jax.registry import one_of

LOGVAR = (-30.0, 20.0)  # to which the log variance is clipped, as published


class Architecture(NamedTuple):
    """Everything that distinguishes one autoencoder from another. The default is that of Stable Diffusion 1 and 2.

    widths: of each level; sides are halved between two levels.
    layers: residual blocks of a level in the encoder; the decoder has one more.
    groups: of all group norms. quant: 1 x 1 convolutions on both sides of the latents.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    quant: bool = True

    @property
    def factor(self) -> int:
        """Pixels along an axis for each latent."""
        return 2 ** (len(self.widths) - 1)


class Layers(NamedTuple):
    """Builds the layers of one network."""

    groups: int
    precision: str
    rngs: Keys

    def conv(self, inputs: int, outputs: int, side: int = 3, **options) -> nnx.Conv:
        return nnx.Conv(inputs, outputs, (side, side), precision=self.precision, rngs=self.rngs, **options)

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, precision=self.precision, rngs=self.rngs)

    def norm(self, width: int) -> nnx.GroupNorm:
        if width % self.groups:
            raise ConfigError(f"vae: groups = {self.groups} does not divide the width {width}")
        # The fast variance is a difference of large numbers.
        return nnx.GroupNorm(width, self.groups, epsilon=1e-6, use_fast_variance=False, rngs=self.rngs)


class Residual(nnx.Module):
    """Twice norm, SiLU and convolution, plus a shortcut."""

    def __init__(self, inputs: int, width: int, layers: Layers):
        self.norm1, self.conv1 = layers.norm(inputs), layers.conv(inputs, width)
        self.norm2, self.conv2 = layers.norm(width), layers.conv(width, width)
        self.shortcut = layers.linear(inputs, width) if inputs != width else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Attention over all pixels, with one head. It holds (h w)^2 numbers for each image."""

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
    """Residual, attention, residual, between the levels and the latents."""

    def __init__(self, width: int, layers: Layers):
        self.first, self.second = (Residual(width, width, layers) for _ in range(2))
        self.attention = Attention(width, layers)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.second(self.attention(self.first(x)))


class Level(nnx.Module):
    """Residual blocks at one resolution. resize: the convolution of the change to the next level, None at the last."""

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
        # Sides are halved by a stride, over pixels that are padded only on the right and below.
        conv = partial(layers.conv, strides=2, padding=((0, 1), (0, 1)))
        self.conv_in = layers.conv(arch.channels, arch.widths[0])
        self.levels = nnx.List(stages(arch.widths, arch.layers, conv, layers))
        self.middle = Middle(last, layers)
        self.norm, self.conv_out = layers.norm(last), layers.conv(last, 2 * arch.latent_channels)
        self.quant = layers.linear(2 * arch.latent_channels, 2 * arch.latent_channels) if arch.quant else None
        self.arch = arch

    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w k2"]:
        _, height, width, channels = images.shape
        factor = self.arch.factor
        if channels != self.arch.channels or height % factor or width % factor:
            given = f"images of {height} x {width} pixels and {channels} channels"
            raise ConfigError(f"vae: {given}: wanted {self.arch.channels} channels and sides that {factor} divides")
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
        self.levels = nnx.List(stages(widths, arch.layers + 1, layers.conv, layers))
        self.norm, self.conv_out = layers.norm(widths[-1]), layers.conv(widths[-1], arch.channels)

    def __call__(self, latents: Float[Array, "b h w k"]) -> Float[Array, "b H W c"]:
        x = self.middle(self.conv_in(latents if self.quant is None else self.quant(latents)))
        for level in self.levels:
            x = level(x)
            x = x if level.resize is None else level.resize(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return self.conv_out(jax.nn.silu(self.norm(x)))


def stages(widths: tuple[int, ...], count: int, conv: Callable[..., nnx.Conv], layers: Layers) -> list[Level]:
    """The levels of an encoder or a decoder, with `count` residual blocks each. conv: builds the resizing layers."""
    each = levels(widths)
    return [Level(before, width, count, conv(width, width) if more else None, layers) for before, width, more in each]


def levels(widths: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """For each level: the width before it, its own width, and whether another level follows."""
    return [(widths[max(i - 1, 0)], width, i + 1 < len(widths)) for i, width in enumerate(widths)]


class VAE(NamedTuple):
    """The autoencoder as pure functions over nested dicts of arrays.

    init:   key -> {"encoder": params, "decoder": params}.
    encode: (params, images [b H W c] in [-1, 1]) -> moments float32 [b h w 2k]: k means, then k standard deviations.
    decode: (params, latents [b h w k]) -> images float32 [b H W c], about [-1, 1], not clipped.

    Latents are before scaling. Each function needs only its own half of the parameters.
    """

    init: Callable[[Array], Params]
    encode: Callable[[Params, Array], Array]
    decode: Callable[[Params, Array], Array]


@cache
def network(arch: Architecture, precision: str = "highest") -> VAE:
    """The autoencoder of an architecture. precision: one of models.PRECISIONS, see above."""
    one_of("vae: precision", precision, PRECISIONS)
    sizes = (arch.channels, arch.latent_channels, arch.layers, arch.groups, len(arch.widths), *arch.widths)
    if min(sizes) < 1:
        raise ConfigError(f"vae: not an architecture: {arch}")
    encoder = functional(lambda rngs: Encoder(arch, Layers(arch.groups, precision, rngs)))
    decoder = functional(lambda rngs: Decoder(arch, Layers(arch.groups, precision, rngs)))

    def init(key: Array) -> Params:
        first, second = jax.random.split(key)
        return {"encoder": encoder.init(first), "decoder": decoder.init(second)}

    return VAE(
        init,
        encode=lambda params, images: encoder.apply(params["encoder"], images),
        decode=lambda params, latents: decoder.apply(params["decoder"], latents),
    )
