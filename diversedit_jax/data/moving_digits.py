"""Handwritten digits that move: videos of 8 frames, 16 x 16 pixels, that need no download.

A digit of `data.digits` moves over a black frame, 2 pixels a frame along both axes. It starts in the corner that it
leaves, and bounces off the walls of the other. Of each digit there are 4 videos, one for each direction. So nothing is
drawn at random, and a run can resume exactly.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, digits

FRAMES, SIDE = 8, 16
SHAPE = (FRAMES, SIDE, SIDE, 1)
FREE = SIDE - digits.SHAPE[0]  # the first row or column of a digit is 0 .. FREE
SPEED = 2  # pixels a frame, along each axis
VERTICAL, HORIZONTAL = ("up", "down"), ("left", "right")
CLASSES = tuple(f"{digit} {row} {column}" for digit in range(10) for row in VERTICAL for column in HORIZONTAL)
AWAY = FREE - np.abs(FREE - SPEED * np.arange(FRAMES))  # the places in each frame, along an axis, of what leaves 0
PATHS = np.stack([FREE - AWAY, AWAY])  # [2 8]: up or to the left at first, down or to the right


@dataclass(frozen=True)
class MovingDigits:
    """Examples by index: `x` float32 [8 16 16 1] in [-1, 1], and `y`, the digit and its first direction as in CLASSES.

    digits: brightness in [0, 1], [k 8 8]. labels: which digits they are.
    order:  numbers of examples, each of a digit and two directions.
    """

    digits: Float[np.ndarray, "k 8 8"]
    labels: Int[np.ndarray, " k"]
    order: Int[np.ndarray, " e"]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        row, down, right = np.unravel_index(self.order[index], (len(self.digits), 2, 2))
        label = 4 * self.labels[row] + 2 * down + right
        return {"x": 2 * video(self.digits[row], PATHS[down], PATHS[right]) - 1, "y": np.int32(label)}


def video(
    digit: Float[np.ndarray, "8 8"], tops: Int[np.ndarray, "8"], lefts: Int[np.ndarray, "8"]
) -> Float[np.ndarray, "8 16 16 1"]:
    """Draw a digit with its first row and column at these places of the frames, on black, which is 0."""
    frames = np.zeros(SHAPE, np.float32)
    for frame, top, left in zip(frames, tops, lefts, strict=True):
        frame[top : top + len(digit), left : left + len(digit), 0] = digit
    return frames


def examples(split: str, data_dir: str | Path | None = None) -> MovingDigits:
    """The examples of a split, see `make`."""
    levels, labels = digits.levels(split, data_dir)
    order = np.random.default_rng(0).permutation(np.arange(4 * len(labels), dtype=np.int32))
    return MovingDigits(levels[..., 0].astype(np.float32) / digits.MAX_LEVEL, labels, order)


def make(split: str, *, data_dir: str | None = None) -> Dataset:
    """The moving digits: `x` float32 [8 16 16 1] in [-1, 1], and `y` int32, one of 40 classes such as `3 up left`.

    `train` has 4 videos of each of 1,437 digits, `test` of each of 360 others, in a random order, always the same.
    data_dir: as in `data.digits`.
    """
    space = Space(SHAPE, Conditions.labels(len(CLASSES), CLASSES), video=True)
    return Dataset(examples(split, data_dir), None, space)
