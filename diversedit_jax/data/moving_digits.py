"""Handwritten digits that move: videos of 8 frames, 16 x 16 pixels, that need no download.

A digit of `data.digits` moves over a black frame, 2 pixels a frame along both axes, and bounces off its walls. At first
it is near the corner that it leaves. Of each digit there are all 16 videos: 2 x 2 places to start from for each of 4
directions. So nothing is drawn at random, and a run can resume exactly.
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


STARTS = (0, 2)  # pixels between a digit and the wall that it leaves


def path(start: int) -> Int[np.ndarray, "8"]:
    """The places, 0 .. FREE, in each frame along one axis, of what moves away from 0 and turns round at both ends."""
    there_and_back = (start + SPEED * np.arange(FRAMES)) % (2 * FREE)
    return FREE - np.abs(FREE - there_and_back)


AWAY = np.stack([path(start) for start in STARTS])
PATHS = np.stack([FREE - AWAY, AWAY])  # [2 2 8]: towards 0 at first, or away from it
KINDS = (2, 2, PATHS.shape[1], PATHS.shape[1])  # down?, right?, vertical path, horizontal path


@dataclass(frozen=True)
class MovingDigits:
    """Examples by index: `x` float32 [8 16 16 1] in [-1, 1], and `y`, the digit and its first direction as in CLASSES.

    digits: brightness in [0, 1], [k 8 8]. labels: which digits they are.
    order:  numbers of examples, each of a digit, two directions and two paths.
    """

    digits: Float[np.ndarray, "k 8 8"]
    labels: Int[np.ndarray, " k"]
    order: Int[np.ndarray, " e"]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        row, down, right, *chosen = np.unravel_index(self.order[index], (len(self.digits), *KINDS))
        tops, lefts = (PATHS[way, number] for way, number in zip((down, right), chosen, strict=True))
        label = 4 * self.labels[row] + 2 * down + right
        return {"x": 2 * video(self.digits[row], tops, lefts) - 1, "y": np.int32(label)}


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
    order = np.random.default_rng(0).permutation(np.arange(len(labels) * np.prod(KINDS), dtype=np.int32))
    return MovingDigits(levels[..., 0].astype(np.float32) / digits.MAX_LEVEL, labels, order)


def make(split: str, *, data_dir: str | None = None) -> Dataset:
    """The moving digits: `x` float32 [8 16 16 1] in [-1, 1], and `y` int32, one of 40 classes such as `3 up left`.

    `train` has 16 videos of each of 1,437 digits, `test` of each of 360 others, in a random order, always the same.
    data_dir: as in `data.digits`.
    """
    space = Space(SHAPE, Conditions.labels(len(CLASSES), CLASSES), video=True)
    return Dataset(examples(split, data_dir), None, space)
