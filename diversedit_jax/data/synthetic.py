"""Random examples from no disk, for benchmarks: normal numbers, because zeros would flatter the speed."""

from dataclasses import dataclass

import numpy as np

from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError

POOL = 256  # distinct images; labels are drawn for every example


@dataclass(frozen=True)
class Noise:
    """Examples by index: `x` float32 [h w c] from a small pool, and a label of its own."""

    pool: np.ndarray  # [p h w c]
    labels: np.ndarray  # [n]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.pool[index % len(self.pool)], "y": self.labels[index]}


def make(
    split: str,
    *,
    shape: tuple[int, int, int] = (32, 32, 4),
    num_classes: int = 1000,
    size: int = 65_536,
    seed: int = 0,
) -> Dataset:
    """`size` examples: `x` float32 standard normal of the given shape, `y` uniform over the classes, 0 without any.

    The same arguments give the same examples; `train` and `test` differ. Only 256 images are distinct.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"synthetic: split must be one of train, test, given {split!r}")
    if len(shape) != 3 or min(*shape, num_classes + 1, size) < 1:
        raise ConfigError(f"synthetic: not a data set: shape={shape}, num_classes={num_classes}, size={size}")
    rng = np.random.default_rng([seed, split == "test"])
    pool = rng.standard_normal((min(POOL, size), *shape), dtype=np.float32)
    labels = rng.integers(max(num_classes, 1), size=size, dtype=np.int32)
    return Dataset(Noise(pool, labels), None, tuple(shape), num_classes)
