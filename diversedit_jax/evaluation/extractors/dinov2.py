"""DINOv2 (arXiv 2304.07193) as feature network, for FD-DINOv2 (arXiv 2306.04675)."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diversedit_jax.api import Params
from diversedit_jax.encoders import IMAGENET_MEAN, IMAGENET_STD, normalise
from diversedit_jax.encoders.dinov2 import KIND
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation.extractors import Extractor, Features, digest
from diversedit_jax.models import bicubic, vit
from diversedit_jax.registry import in_range
from diversedit_jax.weights.vit import open_encoder


def make(*, file: str, side: int = 224, heads: int | None = None) -> Extractor:
    """The class token after the last norm. Published scores use ViT-L/14 (1024), dinov2_vitl14_pretrain.pth.

    Images are resized to side x side, bicubic with antialiasing, as EDM2's evaluator does. The first code for this
    score resized with Pillow, which rounds to 256 levels and gives almost the same. Arithmetic is float32.
    file, heads: as in `encoders.dinov2`.
    """
    in_range("dinov2: side", side, 1)
    in_range("dinov2: heads", 1 if heads is None else heads, 1)
    release = open_encoder(KIND, file, heads, "hub", "float32")
    arch = release.arch
    network = vit.network(arch, "hub", "float32")
    if side % arch.patch:
        raise ConfigError(f"dinov2: side = {side} is not a multiple of its patches of {arch.patch} pixels")

    def apply(weights: Params, images: Array) -> Features:
        if images.ndim != 4 or images.shape[-1] != arch.channels:
            raise ConfigError(f"dinov2: wanted images [b h w {arch.channels}], given {list(images.shape)}")
        rows, columns = (bicubic.weights(given, side, antialias=True) for given in images.shape[1:3])
        x = bicubic.apply(rows, columns, images.astype(jnp.float32))
        x = normalise(x, IMAGENET_MEAN, IMAGENET_STD)
        with jax.default_matmul_precision("highest"):
            tokens = network.apply(weights, x)
        return Features(vit.split(arch, tokens).class_token.astype(jnp.float32))

    read = cache(release.read)
    about = {"weights": {"name": Path(file).name, "digest": digest(read())}}
    about["resize"] = f"bicubic with antialiasing to {side} x {side}"
    return Extractor("dinov2", read, apply, about)
