"""Frozen encoders, one published encoder per file: of images for REPA and REG, of texts for text-to-image.

Preprocessing and choice of features are those of REPA's code (arXiv 2410.06940). An encoder runs on the raw images, or
on the tokens of texts, in every compiled training step. Its weights are an argument.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax import registry
from diversedit_jax.api import Condition, Params
from diversedit_jax.data.clip_tokenizer import Tokenizer
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import bicubic, vit
from diversedit_jax.registry import in_range
from diversedit_jax.weights.vit import Kind, open_encoder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Encoder(NamedTuple):
    """A frozen encoder of images.

    init:  () -> frozen weights: arrays on the host. The first call reads the file.
    apply: (frozen, images [b h w c] with values 0 .. 255) -> (patch tokens [b n d], class token [b d] or None).
    width: d.
    """

    init: Callable[[], Params]
    apply: Callable[[Params, Array], tuple[Array, Array | None]]
    width: int


class TextEncoder(NamedTuple):
    """A frozen encoder of texts.

    init:      () -> frozen weights: arrays on the host. The first call reads the file.
    apply:     (frozen, token ids [b n]) -> the network's condition, {"context": [b n d], "mask": [b n], ...}.
    tokenizer: (length=as many as it takes) -> what makes so many token ids of a text. The first call reads its files.
    check:     raises ConfigError for data whose tokens (`Dataset.text`) are not for this encoder.
    """

    init: Callable[[], Params]
    apply: Callable[[Params, Array], Condition]
    tokenizer: Callable[..., Tokenizer]
    check: Callable[[Mapping[str, Any]], None]


# make(name, **options): the encoder `name`; the options are the keywords of `encoders.<name>.make`.
make = partial(registry.make, "encoders")


def tokens(encoder: Encoder, frozen: Params, images: Array) -> tuple[Float[Array, "b n d"], Float[Array, "b d"] | None]:
    """The patch tokens and the class token of images [b h w c], or of videos [b f h w c], values 0 .. 255.

    Each frame of a video is encoded alone: its patch tokens are [b (f n) d], frame after frame. A video has no class
    token.
    """
    if images.ndim == 4:
        return encoder.apply(frozen, images)
    patches, _ = encoder.apply(frozen, images.reshape(-1, *images.shape[-3:]))
    return patches.reshape(len(images), -1, patches.shape[-1]), None


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Float[Array, "b h w c"]:
    """(images / 255 - mean) / std, channel by channel, in float32."""
    mean, std = (np.asarray(values, np.float32) for values in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def build(
    kind: Kind,
    file: str,
    side: int | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    heads: int | None,
    dtype: str,
    position: str = "repa",
    resize_first: bool = False,
    sizes: tuple[int, ...] = (256,),
) -> Encoder:
    """The encoder in a file. For the options see `encoders.dinov2.make`.

    side: None: 16 patches for each 256 pixels, as in REPA's code, for images of `sizes`.
    resize_first: resize images before they are normalised, not after.
    """
    in_range("heads", 1 if heads is None else heads, 1)
    name, release = kind.name, open_encoder(kind, file, heads, position, dtype)
    arch = release.arch
    network = vit.network(arch, position, dtype)
    for option, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, arch.channels):
            raise ConfigError(f"{name}: {option} has {len(values)} values, the encoder has {arch.channels} channels")
    in_range(f"{name}: std", min(std), above=0)
    if side is not None and (side < 1 or side % arch.patch):
        raise ConfigError(f"{name}: side = {side} must be a multiple of its patches of {arch.patch} pixels")

    def apply(frozen: Params, images: Array) -> tuple[Float[Array, "b n d"], Float[Array, "b d"] | None]:
        if images.ndim != 4 or images.shape[-1] != arch.channels:
            raise ConfigError(f"{name}: wanted images [b h w {arch.channels}], given {list(images.shape)}")
        height, width = images.shape[1:3]
        if side is None and (height != width or height not in sizes):
            rule = "there is a published rule only for " + " or ".join(f"{size} x {size}" for size in sizes)
            raise ConfigError(f"{name}: the images have {height} x {width} pixels, {rule} pixels: set side")
        pixels = 16 * arch.patch * height // 256 if side is None else side
        x = images.astype(jnp.float32)
        x = normalise(sized(x, pixels), mean, std) if resize_first else sized(normalise(x, mean, std), pixels)
        tokens = vit.split(arch, network.apply(frozen, x))
        return tokens.patches, tokens.class_token

    return Encoder(cache(release.read), apply, arch.width)


def factory(
    kind: Kind,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    resize_first: bool = False,
) -> Callable[..., Encoder]:
    """The `make` of an encoder without special options. mean, std: of its training data."""

    def make(
        *,
        file: str,
        side: int | None = None,
        mean: tuple[float, ...] = mean,
        std: tuple[float, ...] = std,
        heads: int | None = None,
        dtype: str = "bfloat16",
    ) -> Encoder:
        """A frozen encoder from a file of its authors. The options are those of `encoders.dinov2.make`."""
        return build(kind, file, side, mean, std, heads, dtype, resize_first=resize_first)

    return make


def sized(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """Images, resized to side x side pixels if needed."""
    return x if x.shape[1:3] == (side, side) else bicubic.resize(x, side)
