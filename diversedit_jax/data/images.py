"""Pixels of a collection of images, to train on without an autoencoder."""

from dataclasses import dataclass

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, image_collections
from diversedit_jax.data.image_collections import ImageFiles
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
        return {"x": np.float32(x) / 127.5 - 1, "y": self.images.labels[index]}


def flip(example: dict, rng: np.random.Generator) -> dict:
    """Mirror the image with probability 1/2."""
    return example | {"x": example["x"][:, ::-1]} if rng.random() < 0.5 else example


def make(
    split: str,
    *,
    data_dir: str,
    size: int = 64,
    kind: str | None = None,
    unconditional: bool = False,
    mirror: bool = False,
) -> Dataset:
    """The images in `data_dir`, cropped to size x size pixels as ADM does, with the classes of the collection.

    kind, unconditional: as in `image_collections.open_images`. mirror: each draw takes the mirror image with
    probability 1/2. Every draw decodes an image: use `config.input.num_workers` if that is slow.
    """
    in_range("images: size", size, 1)
    images = image_collections.open_images(data_dir, kind, None if split == "train" else split, unconditional)
    space = Space((size, size, 3), Conditions.labels(len(images.classes)))
    return Dataset(Pixels(images, size), flip if mirror else None, space)
