"""Pixels of a collection of images, to train on without an autoencoder."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, image_collections
from diversedit_jax.data.image_collections import ImageFiles
from diversedit_jax.data.levels import VALUES, Levels, flip
from diversedit_jax.registry import in_range


@dataclass(frozen=True)
class Pixels:
    """Examples by index: `x` float32 [size size 3] in [-1, 1], and `y`."""

    images: ImageFiles
    size: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        x = image_collections.crop(self.images, index, self.size)
        return {"x": VALUES[x], "y": self.images.labels[index]}

    def decoded(self) -> Levels:
        """All images, decoded once, by all cores."""
        images = np.empty((len(self), self.size, self.size, 3), np.uint8)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, crop in image_collections.crops_ahead(self.images, range(len(self)), self.size, pool, 1024):
                images[index] = crop.result()
        return Levels(images, self.images.labels)


def make(
    split: str,
    *,
    data_dir: str,
    size: int = 64,
    kind: str | None = None,
    unconditional: bool = False,
    mirror: bool = False,
    in_memory: bool = False,
) -> Dataset:
    """The images in `data_dir`, cropped to size x size pixels as ADM does, with the classes of the collection.

    data_dir: the folder or file of the collection. size: side of the images, in pixels.
    kind, unconditional: as in `image_collections.open_images`. mirror: each draw takes the mirror image with
    probability 1/2. in_memory: decode all images once, into 3 x size x size bytes each. Without it, every draw decodes
    an image: use `config.input.num_workers` if that is slow.
    """
    in_range("images: size", size, 1)
    images = image_collections.open_images(data_dir, kind, None if split == "train" else split, unconditional)
    space = Space((size, size, 3), Conditions.labels(len(images.classes), images.classes))
    pixels = Pixels(images, size)
    return Dataset(pixels.decoded() if in_memory else pixels, flip if mirror else None, space)
