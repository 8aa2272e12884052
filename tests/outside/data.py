"""Images with sets of vectors as conditions; see `tests.outside`."""

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset
from tests.outside import DEVIATION, LEVELS, SHAPE, SLOTS, WIDTH, means


def make(split: str, *, size: int = 4096) -> Dataset:
    """`size` examples: `pixels` uint8 [8 8 1], `y` a dict of `context` float16 [3 2] and `mask` bool [3]."""
    rng = np.random.default_rng([size, split == "test"])
    context = rng.choice(np.float16([-1, -0.5, 0.5, 1]), size=(size, SLOTS, WIDTH))
    mask = rng.random((size, SLOTS)) < 0.6
    x = means({"context": context, "mask": mask}) + DEVIATION * rng.standard_normal((size, *SHAPE))
    pixels = np.clip(np.round(128 + LEVELS * x), 0, 255).astype(np.uint8)
    pixels = pixels.reshape(size, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(size, 8, 8, 1)
    source = [
        {"pixels": image, "y": {"context": c, "mask": m}} for image, c, m in zip(pixels, context, mask, strict=True)
    ]
    null = {"context": np.zeros((SLOTS, WIDTH), np.float16), "mask": np.zeros(SLOTS, bool)}
    return Dataset(source, None, Space((8, 8, 1), Conditions(null)))
