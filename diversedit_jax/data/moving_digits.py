"""Handwritten digits that move: videos of 8 frames, 16 x 16 pixels, that need no download.

A digit of `data.digits` moves at constant velocity over a black frame and bounces off its walls. Of each digit there
are all videos: from every place, at 1 or 2 pixels a frame up or down, and as fast or not left or right. So places and
speeds are never drawn at random, and a run can resume exactly.
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
SPEEDS = (1, 2)  # pixels a frame, along each axis
VERTICAL, HORIZONTAL = ("up", "down"), ("left", "right")
CLASSES = tuple(f"{digit} {row} {column}" for digit in range(10) for row in VERTICAL for column in HORIZONTAL)


def path(place: int, velocity: int) -> Int[np.ndarray, "8"]:
    """The places, 0 .. FREE, of something in each frame. It starts at `place` and turns round at both ends."""
    there_and_back = (place + velocity * np.arange(FRAMES)) % (2 * FREE)
    return FREE - np.abs(FREE - there_and_back)


def paths(sign: int) -> list[Int[np.ndarray, "8"]]:
    """All paths that go this way, -1 or 1, from the first frame to the second."""
    moves = [(place, sign * speed) for speed in SPEEDS for place in range(FREE + 1)]
    return [path(place, velocity) for place, velocity in moves if 0 <= place + velocity <= FREE]


PATHS = np.array([paths(-1), paths(1)])  # [2 15 8], along one axis
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

    `train` has 900 videos of each of 1,437 digits, `test` of each of 360 others, in a random order, always the same.
    data_dir: as in `data.digits`.
    """
    space = Space(SHAPE, Conditions.labels(len(CLASSES), CLASSES), video=True)
    return Dataset(examples(split, data_dir), None, space)
