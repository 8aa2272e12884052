"""Images in memory, with 256 levels: read by index on the host, or kept on the devices (`codecs.resident`)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import one_of

VALUES = np.arange(256, dtype=np.float32) / 127.5 - 1  # of the levels 0 .. 255


@dataclass(frozen=True)
class Levels:
    """Examples by index: `x` float32 [h w c] in [-1, 1], and `y`."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"x": VALUES[self.images[index]], "y": self.labels[index]}


def flip(example: dict, rng: np.random.Generator) -> dict:
    """Mirror the image with probability 1/2."""
    return example | {"x": example["x"][:, ::-1]} if rng.random() < 0.5 else example


@dataclass(frozen=True)
class Numbers:
    """Examples by index: only their `number`, because the devices have the images."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"number": np.int32(index)}


def drawn(example: dict, rng: np.random.Generator) -> dict:
    """Say whether `flip` would mirror the image."""
    return example | {"mirrored": rng.random() < 0.5}


def numbered(dataset: Dataset) -> Dataset:
    """The same examples, in the same order and with the same draws, as numbers for `codecs.resident`."""
    if not isinstance(dataset.source, Levels) or dataset.transform not in (None, flip):
        raise ConfigError(
            "config.input.resident: only data in memory with 256 levels can lie on the devices: "
            "`fashion`, `cifar10`, and `images` with in_memory=True"
        )
    return dataset._replace(source=Numbers(len(dataset.source)), transform=dataset.transform and drawn)


def shrunk(what: str, images: UInt8[np.ndarray, "n h h c"], size: int) -> UInt8[np.ndarray, "n s s c"]:
    """Square images at their own size or a half or a quarter of it: means of 2 x 2 or 4 x 4 pixels, rounded."""
    n, side, _, channels = images.shape
    one_of(what, size, (side, side // 2, side // 4))
    k = side // size
    if k == 1:
        return images
    sums = images.reshape(n, size, k, size, k, channels).sum(axis=(2, 4), dtype=np.uint16)
    return np.round(sums / k**2).astype(np.uint8)
