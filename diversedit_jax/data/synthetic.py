"""Random examples without a disk, for benchmarks. Normal numbers, because zeros would be computed too fast."""

import math
from dataclasses import dataclass

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of

POOL = 256  # distinct examples


@dataclass(frozen=True)
class Noise:
    """Examples by index: `x` float32 [*s c] from a small pool, and `y`: a label of its own, or a text from a pool."""

    size: int
    pool: np.ndarray  # [p *s c]
    conditions: np.ndarray  # labels [n], or token ids [p tokens]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return {"x": self.pool[index % len(self.pool)], "y": self.conditions[index % len(self.conditions)]}


def make(
    split: str,
    *,
    shape: tuple[int, ...] = (32, 32, 4),
    num_classes: int = 1000,
    tokens: int = 0,
    video: bool = False,
    size: int = 65_536,
    seed: int = 0,
) -> Dataset:
    """`size` examples: `x` float32 standard normal, `y` uniform over the classes, 0 without any.

    shape: (*spatial, channels): (h, w, c) of an image, (f, h, w, c) of a video, (d, h, w, c) of a volume.
    num_classes: number of labels. size: number of examples. seed: of their values.
    tokens: so many labels are one condition, as the token ids of a text are. 0: one label is.
    video: the first axis of `shape` (f, h, w, c) is time.

    The same arguments give the same examples; `train` and `test` differ. Only 256 examples are distinct.
    """
    one_of("synthetic: split", split, ("train", "test"))
    in_range("synthetic: num_classes", num_classes, 0)
    in_range("synthetic: tokens", tokens, 0, 2**16)
    in_range("synthetic: seed", seed, 0)
    in_range("synthetic: size", size, 1, 2**28)
    in_range("synthetic: shape", min(shape, default=0), 1)
    in_range("synthetic: shape", math.prod(shape), 1, 2**24)
    rng = np.random.default_rng([seed, split == "test"])
    if video and len(shape) != 4:
        raise ConfigError(f"synthetic: a video has shape (f, h, w, c), given {tuple(shape)}")
    pool = rng.standard_normal((min(POOL, size), *shape), dtype=np.float32)
    labels = rng.integers(max(num_classes, 1), size=(POOL, tokens) if tokens else size, dtype=np.int32)
    conditions = Conditions(np.zeros(tokens, np.int32)) if tokens else Conditions.labels(num_classes)
    return Dataset(Noise(size, pool, labels), None, Space(tuple(shape), conditions, video))
