"""A small feature network for the digits, so that every score can be tried without a download.

It has two layers of fixed random convolutions and a linear classifier of the ten digits, which is fitted to the 1,437
training images in a second. Its scores only compare runs on the digits.
"""

from collections.abc import Mapping
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diversedit_jax.api import Params
from diversedit_jax.data import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation.extractors import Extractor, Features

WIDTHS = (16, 24)
SPATIAL = 4  # channels of the last map that are spatial features: 4 x 4 x 4 = 64
SEED = 0


def make(*, data_dir: str | None = None) -> Extractor:
    """The network. Its reference is the training digits. data_dir: as in `data.digits`.

    Images [b 8 8 1] with values 0 .. 255 are first rounded to the 17 levels of the data. The 96 pool features are the
    means of the last map over its four quarters.
    """

    @cache
    def weights() -> Params:
        from sklearn.linear_model import LogisticRegression

        images, labels = digits.levels("train", data_dir)
        convolutions = random_convolutions()
        pool = np.asarray(jax.jit(features)(convolutions, as_bytes(images)).pool, np.float64)
        mean, std = pool.mean(axis=0), pool.std(axis=0)
        fitted = LogisticRegression(max_iter=1000).fit((pool - mean) / std, labels)
        kernel = fitted.coef_.T / std[:, None]
        bias = np.float32(fitted.intercept_ - mean @ kernel)
        return convolutions | {"classifier": {"kernel": np.float32(kernel), "bias": bias}}

    def reference() -> UInt8[np.ndarray, "n 8 8 1"]:
        return as_bytes(digits.levels("train", data_dir)[0])

    about = {"weights": {"name": "random convolutions", "seed": SEED, "widths": list(WIDTHS)}, "resize": None}
    return Extractor("digits", weights, features, about, reference, chunk=2)


def random_convolutions() -> dict[str, np.ndarray]:
    """The kernels [3 3 c d], the same on every machine."""
    rng = np.random.default_rng(SEED)
    first, second = WIDTHS
    shapes = {"first": (3, 3, 1, first), "second": (3, 3, first, second)}
    return {name: np.float32(rng.normal(size=s) * np.sqrt(2 / np.prod(s[:3]))) for name, s in shapes.items()}


def as_bytes(levels: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
    """Levels 0 .. 16 as 0 .. 255."""
    return np.round(levels * (255 / digits.MAX_LEVEL)).astype(np.uint8)


def features(weights: Mapping[str, Params], images: Array) -> Features:
    """The features of images, with logits if the weights have a classifier."""
    if images.shape[1:] != digits.SHAPE:
        raise ConfigError(f"digits: wanted images [b 8 8 1], given {list(images.shape)}")
    x = jnp.round(images.astype(jnp.float32) * (digits.MAX_LEVEL / 255)) / (digits.MAX_LEVEL / 2) - 1
    x = jax.nn.relu(_convolved(x, weights["first"], 1))
    x = jax.nn.relu(_convolved(x, weights["second"], 2))
    pool = x.reshape(len(x), 2, 2, 2, 2, -1).mean(axis=(2, 4)).reshape(len(x), -1)
    spatial = x[..., :SPATIAL].reshape(len(x), -1)
    if "classifier" not in weights:
        return Features(pool, spatial)
    product = jnp.matmul(pool, weights["classifier"]["kernel"], precision="highest")
    return Features(pool, spatial, product + weights["classifier"]["bias"])


def _convolved(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], stride: int) -> Float[Array, "b H W d"]:
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": "highest"}
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", **options)
