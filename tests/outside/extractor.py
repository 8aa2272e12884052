"""Features of the project's images: means of their 2 x 2 patches."""

import jax.numpy as jnp
import numpy as np

from diversedit_jax.evaluation.extractors import Extractor, Features
from tests.outside import data


def make() -> Extractor:
    """The extractor; it compares with the training images."""

    def apply(weights, images):
        return Features(images.reshape(-1, 4, 2, 4, 2).astype(jnp.float32).mean(axis=(2, 4)).reshape(-1, 16) / 32)

    def reference():
        return np.stack([example["pixels"] for example in data.make("train").source])

    return Extractor("patches", dict, apply, {"weights": {"name": "none"}, "resize": None}, reference)
