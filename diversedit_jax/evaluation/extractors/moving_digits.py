"""A small feature network for videos of moving digits, so that scores of videos can be tried without a download.

It has two layers of fixed random convolutions over frames, rows and columns, so its features depend on the order of
frames. `of_frames` has as many over rows and columns alone. Scores only compare runs on the moving digits.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diversedit_jax.api import Params
from diversedit_jax.data import moving_digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation.extractors import Extractor, Features

WIDTHS = (16, 24)
SEED = 0
REFERENCE = 2_000  # training videos to compare with


def make(*, data_dir: str | None = None) -> Extractor:
    """The network of videos. Its reference is the first 2,000 training videos. data_dir: as in `data.digits`.

    The 96 pool features are the means of the last map over all frames, for each quarter of the picture. It has no
    spatial features and no logits.
    """

    def apply(weights: Params, videos: Array) -> Features:
        if videos.shape[1:] != moving_digits.SHAPE:
            raise ConfigError(f"moving_digits: wanted videos [b 8 16 16 1], given {list(videos.shape)}")
        return Features(pooled(weights, videos))

    def reference() -> UInt8[np.ndarray, "n 8 16 16 1"]:
        return first(moving_digits.examples("train", data_dir), REFERENCE)

    about = {"weights": {"name": "random convolutions", "seed": SEED, "widths": list(WIDTHS)}, "resize": None}
    return Extractor("moving_digits", lambda: random_convolutions(3), apply, about, reference)


def of_frames(videos: UInt8[np.ndarray, "n f h w 1"]) -> Float[np.ndarray, "m 96"]:
    """The features of each frame alone, m = n f, on the host."""
    return np.asarray(jax.jit(pooled)(random_convolutions(2), videos.reshape(-1, 1, *videos.shape[2:])))


def of_clips(videos: UInt8[np.ndarray, "n f h w 1"]) -> Float[np.ndarray, "n 96"]:
    """The features of whole videos, on the host."""
    return np.asarray(jax.jit(pooled)(random_convolutions(3), videos))


def first(source: Any, count: int) -> UInt8[np.ndarray, "n 8 16 16 1"]:
    """The videos of the first examples, with 256 levels as samples have. source: examples by index."""
    return np.stack([np.round((source[i]["x"] + 1) * 127.5).astype(np.uint8) for i in range(count)])


def random_convolutions(axes: int) -> dict[str, np.ndarray]:
    """The kernels [f 3 3 c d], the same on every machine. axes: 3 with three frames, 2 with one."""
    rng, frames = np.random.default_rng(SEED), 3 if axes == 3 else 1
    shapes = {"first": (frames, 3, 3, 1, WIDTHS[0]), "second": (frames, 3, 3, *WIDTHS)}
    return {name: np.float32(rng.normal(size=s) * np.sqrt(2 / np.prod(s[:4]))) for name, s in shapes.items()}


def pooled(weights: Mapping[str, Array], videos: UInt8[Array, "b f h w 1"]) -> Float[Array, "b 96"]:
    """The means of the last map over frames, for each quarter of the picture."""
    x = videos.astype(jnp.float32) / 255  # black is 0 and gives 0, wherever it is
    for kernel in (weights["first"], weights["second"]):
        options = {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC"), "precision": "highest"}
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 2, 2), "SAME", **options))
    b, f, h, w, c = x.shape
    return x.reshape(b, f, 2, h // 2, 2, w // 2, c).mean(axis=(1, 3, 5)).reshape(b, 4 * c)
