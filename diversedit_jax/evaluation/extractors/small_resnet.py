"""A small residual classifier as feature network, for small images that Inception was not made for.

`tools/studies/classifier.py` trains it. Its scores compare runs on the same data; they are no published FID.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import relu
from jaxtyping import Array, Float, UInt8

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.evaluation.extractors import Extractor, Features, digest
from diversedit_jax.weights import hub
from diversedit_jax.weights.formats.weights_file import open_weights

Given = Array | np.ndarray  # weights as the file has them, or traced
LAYERS = ("first", "second", "short")  # of a stage

# (name of the layer, x, stride) -> x: a convolution and its norm
Convolve = Callable[[str, Float[Array, "b h w c"], int], Float[Array, "b H W d"]]


def make(*, file: str) -> Extractor:
    """The mean over places of the last map, and the logits of the classes.

    file: safetensors, with `LAYER/kernel` [h w c d] and `LAYER/bias` [d] of each convolution, norms folded in, and of
        the classifier; and with the `side` of its images. Images of half the side are enlarged by repetition.
    """
    with open_weights(hub.local(file)) as opened:
        arrays = {name: np.float32(opened[name]) for name in opened.shapes}
        side = int(about) if (about := opened.about.get("side", "")).isdecimal() else 0
    weights = {name.rpartition("/")[0]: {} for name in arrays}
    for name, array in arrays.items():
        layer, _, part = name.rpartition("/")
        weights[layer][part] = array

    def checked(weights: Params, images: Array) -> Features:
        images = enlarged(images) if 2 * images.shape[1] == side else images
        if images.shape[1:] != shape:
            raise ConfigError(f"small_resnet: wanted images {list(shape)}, given {list(images.shape[1:])}")
        return apply(weights, images)

    try:
        shape = (side, side, weights["stem"]["kernel"].shape[2])
        jax.eval_shape(apply, weights, jax.ShapeDtypeStruct((1, *shape), np.uint8))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        text = f"{file} is not a classifier that tools/studies/classifier.py has written"
        raise WeightsError(f"small_resnet: {text}") from error
    about = {"weights": {"name": Path(file).name, "digest": digest(weights)}, "resize": None}
    return Extractor("small_resnet", lambda: weights, checked, about, chunk=100)


def enlarged(images: UInt8[Array, "b h w c"]) -> UInt8[Array, "b H W c"]:
    """Images of twice the side: each pixel becomes 2 x 2."""
    return jnp.repeat(jnp.repeat(images, 2, axis=1), 2, axis=2)


def apply(weights: Params, images: UInt8[Array, "b h w c"]) -> Features:
    """The features of images by folded weights."""

    def convolve(name: str, x: Array, stride: int) -> Array:
        return convolution(x, weights[name]["kernel"], stride) + weights[name]["bias"]

    pool = features(convolve, images, *layout(weights))
    return Features(pool, None, linear(pool, **weights["classifier"]))


def layout(weights: Params) -> tuple[int, int]:
    """The number of residual blocks, and the stride of the stem: 2 with kernels of 4 x 4, 1 with kernels of 3 x 3."""
    return sum(name.endswith("/first") for name in weights), weights["stem"]["kernel"].shape[0] // 2


def features(convolve: Convolve, images: UInt8[Array, "b h w c"], stages: int, stride: int) -> Float[Array, "b d"]:
    """The network up to its classifier: a stem, and for each stage a residual block that halves the map."""
    x = relu(convolve("stem", images.astype(jnp.float32) / 127.5 - 1, stride))
    for stage in range(stages):
        first, second, short = (partial(convolve, f"{stage}/{layer}") for layer in LAYERS)
        x = relu(second(relu(first(x, 2)), 1) + short(x, 2))
    return x.mean(axis=(1, 2))


def linear(x: Float[Array, "b d"], kernel: Float[Given, "d k"], bias: Float[Given, " k"]) -> Float[Array, "b k"]:
    """The classifier."""
    return jnp.matmul(x, kernel, precision="highest") + bias


def convolution(x: Float[Array, "b h w c"], kernel: Float[Given, "k k c d"], stride: int) -> Float[Array, "b H W d"]:
    """Without bias. Zeros around the image."""
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": "highest"}
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", **options)
