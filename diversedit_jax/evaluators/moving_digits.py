"""Do samples show the digit that their class says, moving as it says? Both are read back without the network."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from sklearn.svm import SVC

from diversedit_jax.data import digits
from diversedit_jax.data.moving_digits import CLASSES, FRAMES, PATHS, SHAPE, SIDE, MovingDigits
from diversedit_jax.evaluation.extractors.moving_digits import REFERENCE, first, of_clips, of_frames
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.metrics.frechet import frechet_distance, moments
from diversedit_jax.registry import in_range

DARK = 0.2  # of 1; what is darker is background
CUT = 10  # rows and columns around the centre that the classifier sees
OFFSET = 1.0  # pixels: farthest that the centre of brightness of a digit lies from the centre of its 8 x 8 pixels
NEAR = 0.5  # pixels: farthest that a centre may lie from its path
LEAST, MOST = 100, 1440  # samples: more than features, and no more than held-out videos
NAMES = ("digit", "same", "direction", "motion")

Sample = Callable[[np.ndarray], np.ndarray]  # int32 labels [n] -> uint8 videos [n 8 16 16 1]


class Seen(NamedTuple):
    """What videos show.

    digits:  in each frame. down, right: whether the digit goes that way from the first frame to the second.
    motion:  whether it moves at a constant velocity of the data, and bounces off the walls.
    """

    digits: Int[np.ndarray, "n 8"]
    down: Bool[np.ndarray, " n"]
    right: Bool[np.ndarray, " n"]
    motion: Bool[np.ndarray, " n"]

    def agrees(self, labels: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n 4"]:
        """Whether videos show what their classes say, in the order of NAMES.

        digit: in most frames, or half of them. same: one digit in all frames.
        """
        digit, down, right = np.unravel_index(labels, (10, 2, 2))
        return np.stack(
            [
                (self.digits == digit[:, None]).mean(axis=1) >= 0.5,
                (self.digits == self.digits[:, :1]).all(axis=1),
                (self.down == down) & (self.right == right),
                self.motion,
            ],
            axis=1,
        )


class Judge:
    """Videos, uint8 [n 8 16 16 1] -> Seen.

    A support vector machine sees what lies around the centre of brightness of each frame. The centre moves as in the
    data if it is nowhere farther than NEAR from one of PATHS along each axis. All of a path may be moved by OFFSET,
    because digits are not brightest in their middle.
    """

    def __init__(self, data: MovingDigits):
        """Fit the classifier to the digits of `data`."""
        frames = np.zeros((len(data.digits), SIDE, SIDE), np.float32)
        frames[:, 4:12, 4:12] = data.digits
        light = without_background(frames)
        self.classifier = SVC(C=10).fit(cut_out(light, centres(light)), data.labels)

    def __call__(self, videos: UInt8[np.ndarray, "n 8 16 16 1"]) -> Seen:
        """Look at the videos."""
        light = without_background(videos[..., 0].reshape(-1, SIDE, SIDE) / np.float32(255))
        middle = centres(light)
        digits = self.classifier.predict(cut_out(light, middle)).reshape(-1, FRAMES)
        moving = middle.reshape(-1, FRAMES, 2)
        down, right = (moving[:, 1] > moving[:, 0]).T
        near = [distance_to_paths(moving[..., axis]) <= NEAR for axis in range(2)]
        return Seen(digits, down, right, np.all(near, axis=0))


def without_background(light: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n h w"]:
    """Frames whose dark pixels are 0."""
    return np.where(light < DARK, 0, light)


def centres(light: Float[np.ndarray, "n h w"]) -> Float[np.ndarray, "n 2"]:
    """The row and column of the centre of brightness of each frame; that of the frame if it is dark."""
    total, middle = light.sum(axis=(1, 2)), (SIDE - 1) / 2
    places = np.arange(SIDE) - middle
    sums = np.stack([light.sum(axis=2) @ places, light.sum(axis=1) @ places], axis=1)
    return middle + sums / np.maximum(total, DARK)[:, None]


def cut_out(light: Float[np.ndarray, "n h w"], middle: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 100"]:
    """The CUT x CUT pixels around a place of each frame, by linear interpolation, as values in [-1, 1]."""
    wanted = middle[..., None] + np.arange(CUT) - (CUT - 1) / 2
    rows, columns = np.moveaxis(np.maximum(1 - np.abs(wanted[..., None] - np.arange(SIDE)), 0), 1, 0)
    return 2 * np.einsum("nih,nhw,njw->nij", rows, light, columns, optimize=True).reshape(len(light), -1) - 1


def distance_to_paths(middle: Float[np.ndarray, "n 8"]) -> Float[np.ndarray, " n"]:
    """The largest distance of any frame's centre, along one axis, from the nearest path, moved by OFFSET at most."""
    apart = middle[:, None] - (PATHS + (digits.SHAPE[0] - 1) / 2)  # [n 2 8]
    low, high = apart.min(axis=2), apart.max(axis=2)
    moved = np.clip((low + high) / 2, -OFFSET, OFFSET)
    return np.maximum(high - moved, moved - low).min(axis=1)


def make(spec: SampleSpec, *, num: int = 400) -> Callable[[Sample], Iterable[tuple[str, float]]]:
    """The evaluator: `run(sample)` draws `num` videos, of every class in turn, and yields accuracies and distances.

    digit, same, direction, motion: the share of samples that show the digit of their class in half of their frames or
        more, one digit in all frames, the direction of their class, and a motion of the data. all: all four at once.
    real/NAME: the same of as many held-out videos. They bound the others.
    frechet_frame, frechet_clip: Frechet distances to 2,000 training videos, of features of single frames and of whole
        videos (`extractors.moving_digits`). frechet_frame_floor, frechet_clip_floor: those of the held-out videos.
    num: of samples.
    Raises ConfigError if the data of the run are not `data.moving_digits`.
    """
    in_range("moving_digits: num", num, LEAST, MOST)
    train = spec.judged("moving_digits", MovingDigits, "videos", SHAPE)

    @cache  # read and fit once, at the first run
    def prepared() -> tuple[Judge, Callable, dict[str, float]]:
        judge, test = Judge(train), spec.data("test").source
        known = [moments(of(first(train, REFERENCE))).gaussian for of in (of_frames, of_clips)]
        real, labels = first(test, num), np.array([test[i]["y"] for i in range(num)])
        constants = {f"real/{name}": share for name, share in accuracies(judge(real).agrees(labels))}
        constants |= {f"{name}_floor": value for name, value in distances(real, known)}
        return judge, partial(distances, known=known), constants

    def run(sample: Sample) -> Iterable[tuple[str, float]]:
        judge, distance, constants = prepared()
        labels = np.arange(num, dtype=np.int32) % len(CLASSES)
        videos = sample(labels)
        yield from accuracies(judge(videos).agrees(labels))
        yield from distance(videos)
        yield from constants.items()

    return run


def accuracies(right: Bool[np.ndarray, "n 4"]) -> list[tuple[str, float]]:
    """The share of videos in which each of NAMES is right, and all are."""
    return [(name, float(one.mean())) for name, one in zip((*NAMES, "all"), (*right.T, right.all(axis=1)), strict=True)]


def distances(videos: UInt8[np.ndarray, "n 8 16 16 1"], known: list) -> list[tuple[str, float]]:
    """Frechet distances of frames and of whole videos. known: mean and covariance of each kind of features."""
    kinds = {"frechet_frame": of_frames, "frechet_clip": of_clips}
    return [
        (name, frechet_distance(*moments(of(videos)).gaussian, *gaussian))
        for (name, of), gaussian in zip(kinds.items(), known, strict=True)
    ]
