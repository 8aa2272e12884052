"""The network behind FID: InceptionV3 (arXiv 1512.00567) as Google released it in 2015, from images to features.

The features are those of ADM's evaluator (arXiv 2105.05233). Differences from torchvision's InceptionV3: images are
resized as in TensorFlow 1, average pools leave the padding out, the last block pools by the maximum, and there are 1008
classes. Arithmetic is float32; `precision` applies to the convolutions and the logits.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from diversedit_jax.errors import ConfigError
from diversedit_jax.models import PRECISIONS, Keys, Model, bicubic, functional
from diversedit_jax.registry import one_of

SIDE = 299  # pixels of the images that the network sees
WIDTH, CLASSES = 2048, 1008
SPATIAL = 7  # channels of the spatial features
EPSILON = 1e-3  # of batch norm


class Features(NamedTuple):
    """Features that the metrics read, float32.

    pool:    [b 2048], the last activations averaged over their places: FID, precision and recall.
    spatial: [b 2023], 7 channels at 17 x 17 places, flattened in the order h w c: sFID.
    logits:  [b 1008], without the bias of the classifier: inception score, as ADM computes it.
    """

    pool: Float[Array, "b 2048"]
    spatial: Float[Array, "b 2023"]
    logits: Float[Array, "b 1008"]


class Conv(NamedTuple):
    """A convolution without bias, followed by batch norm and ReLU."""

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


# The steps of a branch: the name of a pool, or convolutions of one input whose outputs are joined (mostly one).
Steps = tuple[str | tuple[Conv, ...], ...]

POOLS: dict[str, Callable[[Array], Array]] = {
    "average": partial(nnx.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False),
    "maximum": partial(nnx.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME"),
    "halve": partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding="VALID"),
}


def conv(width: int, height: int = 1, across: int = 1) -> tuple[Conv]:
    """A step of one convolution that keeps the size."""
    return (Conv(width, (height, across)),)


def shrink(width: int, stride: int = 1) -> tuple[Conv]:
    """A step of one 3 x 3 convolution without padding."""
    return (Conv(width, (3, 3), stride, "VALID"),)


def block_35(pool: int) -> dict[str, Steps]:
    """A block at 35 x 35 places."""
    return {
        "branch1x1": (conv(64),),
        "branch5x5": (conv(48), conv(64, 5, 5)),
        "branch3x3dbl": (conv(64), conv(96, 3, 3), conv(96, 3, 3)),
        "branch_pool": ("average", conv(pool)),
    }


def block_17(width: int) -> dict[str, Steps]:
    """A block at 17 x 17 places."""
    down, across = conv(width, 7, 1), conv(width, 1, 7)
    return {
        "branch1x1": (conv(192),),
        "branch7x7": (conv(width), across, conv(192, 7, 1)),
        "branch7x7dbl": (conv(width), down, across, down, conv(192, 1, 7)),
        "branch_pool": ("average", conv(192)),
    }


def block_8(pool: str) -> dict[str, Steps]:
    """A block at 8 x 8 places."""
    fork = conv(384, 1, 3) + conv(384, 3, 1)
    return {
        "branch1x1": (conv(320),),
        "branch3x3": (conv(384), fork),
        "branch3x3dbl": (conv(448), conv(384, 3, 3), fork),
        "branch_pool": (pool, conv(192)),
    }


STEM: Steps = (shrink(32, 2), shrink(32), conv(64, 3, 3), "halve", conv(80), shrink(192), "halve")

# The branches of each block, in the order in which their channels are joined. The names are those of torch releases.
BLOCKS: dict[str, dict[str, Steps]] = {
    "5b": block_35(32),
    "5c": block_35(64),
    "5d": block_35(64),
    "6a": {
        "branch3x3": (shrink(384, 2),),
        "branch3x3dbl": (conv(64), conv(96, 3, 3), shrink(96, 2)),
        "branch_pool": ("halve",),
    },
    "6b": block_17(128),
    "6c": block_17(160),
    "6d": block_17(160),
    "6e": block_17(192),
    "7a": {
        "branch3x3": (conv(192), shrink(320, 2)),
        "branch7x7x3": (conv(192), conv(192, 1, 7), conv(192, 7, 1), shrink(192, 2)),
        "branch_pool": ("halve",),
    },
    "7b": block_8("average"),
    "7c": block_8("maximum"),
}


class Unit(nnx.Module):
    """Convolution, batch norm by the statistics of training, ReLU."""

    def __init__(self, inputs: int, spec: Conv, precision: str, rngs: Keys):
        self.spec, self.precision = spec, precision
        self.kernel = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), (*spec.kernel, inputs, spec.width)))
        self.scale, self.var = (nnx.Param(jnp.ones(spec.width)) for _ in range(2))
        self.bias, self.mean = (nnx.Param(jnp.zeros(spec.width)) for _ in range(2))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        strides, layout = (self.spec.stride, self.spec.stride), ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, self.kernel[...], strides, self.spec.padding, dimension_numbers=layout, precision=self.precision
        )
        factor = self.scale * jax.lax.rsqrt(self.var + EPSILON)
        return jax.nn.relu((x - self.mean) * factor + self.bias)


class Branch(nnx.Module):
    """Steps one after the other; `width` is that of the last."""

    def __init__(self, inputs: int, steps: Steps, precision: str, rngs: Keys):
        units, width = [], inputs
        for step in steps:
            if not isinstance(step, str):
                units += [Unit(width, spec, precision, rngs) for spec in step]
                width = sum(spec.width for spec in step)
        self.units = nnx.List(units)
        self.steps, self.width = steps, width

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        units = iter(self.units)
        for step in self.steps:
            joined = [POOLS[step](x)] if isinstance(step, str) else [next(units)(x) for _ in step]
            x = jnp.concatenate(joined, axis=-1)
        return x


class Network(nnx.Module):
    """Images as the network sees them -> Features."""

    def __init__(self, precision: str, rngs: Keys):
        self.stem = Branch(3, STEM, precision, rngs)
        blocks, width = {}, self.stem.width
        for name, branches in BLOCKS.items():
            made = {branch: Branch(width, steps, precision, rngs) for branch, steps in branches.items()}
            blocks[name] = nnx.Dict(made)
            width = sum(branch.width for branch in made.values())
        self.blocks = nnx.Dict(blocks)
        self.classifier = nnx.Linear(width, CLASSES, use_bias=False, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "b 299 299 3"]) -> Features:
        x = self.stem(x)
        for name, branches in BLOCKS.items():
            x = jnp.concatenate([self.blocks[name][branch](x) for branch in branches], axis=-1)
            if name == "6d":  # ADM's evaluator calls its first branch, branch1x1, mixed_6/conv
                spatial = x[..., :SPATIAL].reshape(len(x), -1)
        pool = x.mean(axis=(1, 2))
        return Features(pool, spatial, self.classifier(pool))


def resize_weights(given: int, wanted: int = SIDE) -> np.ndarray:
    """The matrix [wanted given] that resizes an axis bilinearly as TensorFlow 1 does, for `bicubic.apply`.

    Output pixel i lies at i * given / wanted: the first pixels coincide, not the centres. The last input pixel is
    repeated beyond the edge. There is no antialiasing. Coordinates are float32, as in TensorFlow.
    """
    place = np.arange(wanted, dtype=np.float32) * (np.float32(given) / np.float32(wanted))
    before = np.floor(place).astype(int)
    share = place - before.astype(np.float32)
    matrix = np.zeros((wanted, given), np.float32)
    rows = np.arange(wanted)
    np.add.at(matrix, (rows, np.minimum(before, given - 1)), 1 - share)
    np.add.at(matrix, (rows, np.minimum(before + 1, given - 1)), share)
    return matrix


def inputs(images: Array) -> Float[Array, "b 299 299 3"]:
    """Images [b h w 3] with values 0..255 as the network sees them: resized, then (x - 128) / 128."""
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise ConfigError(f"inception: images of shape {list(images.shape)}: wanted [b h w 3], of values 0..255")
    _, height, width, _ = images.shape
    resized = bicubic.apply(resize_weights(height), resize_weights(width), images.astype(jnp.float32))
    return (resized - 128) / 128


@cache
def network(precision: str = "highest") -> Model:
    """The network as pure functions.

    init:  key -> params. apply: (params, images [b h w 3] with values 0..255, of any size) -> Features.
    precision: of its matrix products, one of models.PRECISIONS. On a CPU all of them are float32.
    """
    one_of("inception: precision", precision, PRECISIONS)
    model = functional(partial(Network, precision))
    return model._replace(apply=lambda params, images: model.apply(params, inputs(images)))
