"""Do samples show what their captions say? Digit, colour, size and place are read back without the network."""

from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from sklearn.svm import SVC

from diversedit_jax.data.captioned_digits import (
    ATTRIBUTES,
    COLOURS,
    FULL,
    SHAPE,
    SIDES,
    CaptionedDigits,
    resized,
)
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.registry import in_range

BRIGHT = 0.4  # of 1; each row of a digit has a pixel that is brighter
PARTS = {"seen": "test", "held_out": "held_out"}  # names of scores: the split that has the captions
MOST = 2304  # examples of the smaller split

Sample = Callable[..., np.ndarray]  # (token ids [n 16], first=) -> uint8 images [n 16 16 3]


class Judge:
    """Images, uint8 [n 16 16 3] -> attributes, int [n 4], in the order of ATTRIBUTES.

    Colour: the hue of COLOURS that is nearest to the sum of all pixels. Size: the number of rows with a bright pixel.
    Place: the corner that the centre of brightness is nearest to. Digit: by a support vector machine, after the corner
    has been cut out and made 8 x 8 pixels.
    """

    def __init__(self, data: CaptionedDigits):
        """Fit the classifier to the digits of `data` in both sizes."""
        labels = np.empty(len(data.digits[0]), int)
        labels[data.rows] = data.attributes[:, 0]
        images = np.concatenate([flat(digits) for digits in data.digits])
        self.classifier = SVC(C=10).fit(images, np.tile(labels, len(SIDES)))

    def __call__(self, images: UInt8[np.ndarray, "n 16 16 3"]) -> Int[np.ndarray, "n 4"]:
        """Read the attributes."""
        pixels = images / np.float32(255)
        hues = COLOURS / np.linalg.norm(COLOURS, axis=1, keepdims=True)
        colour = (pixels.sum(axis=(1, 2)) @ hues.T).argmax(axis=1)
        light = pixels.max(axis=3)
        bright_rows = (light.max(axis=2) > BRIGHT).sum(axis=1)
        size = (bright_rows > np.mean(SIDES)).astype(int)
        low, right = (in_second_half(light.sum(axis=axis)) for axis in (2, 1))
        both = [self.classifier.predict(flat(corners(light, side, low, right))) for side in SIDES]
        digit = np.where(size == 0, *both)
        return np.stack([digit, colour, size, 2 * low + right], axis=1)


def in_second_half(light: Float[np.ndarray, "n k"]) -> Int[np.ndarray, " n"]:
    """Whether the centre of light along an axis lies in its second half, 0 or 1."""
    return (light @ (np.arange(light.shape[1]) - (light.shape[1] - 1) / 2) > 0).astype(int)


def corners(
    light: Float[np.ndarray, "n 16 16"], side: int, low: Int[np.ndarray, " n"], right: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n s s"]:
    """A corner of each image: the lower or upper one, at the right or left."""
    rows, columns = ((SHAPE[0] - side) * part[:, None] + np.arange(side) for part in (low, right))
    return light[np.arange(len(light))[:, None, None], rows[:, :, None], columns[:, None]]


def flat(light: Float[np.ndarray, "n s s"]) -> Float[np.ndarray, "n 64"]:
    """Digits as 8 x 8 pixels in [-1, 1]."""
    return 2 * resized(light, SIDES[0]).reshape(len(light), -1) - 1


def make(spec: SampleSpec, *, num: int = 512) -> Callable[[Sample], Iterable[tuple[str, float]]]:
    """The evaluator: `run(sample)` draws images for captions of two kinds, and yields accuracies.

    seen/NAME: of samples whose combination of attributes the training data have. held_out/NAME: of the others.
    real/NAME: of the judge, on the held-out digits that have these combinations, of both kinds. It bounds the others.
    NAME is digit, colour, size, place, or `all`: every attribute of the caption is right.
    num: samples of each kind. Their captions say every attribute, in each form equally often.
    Raises ConfigError if the data of the run are not `data.captioned_digits`.
    """
    in_range("captioned_digits: num", num, 1, MOST)
    train = spec.judged("captioned_digits", CaptionedDigits, "images", SHAPE)

    @cache  # read and fit once, at the first run
    def prepared() -> tuple[Judge, dict[str, CaptionedDigits]]:
        return Judge(train), {part: spec.data(split).source for part, split in PARTS.items()}

    def run(sample: Sample) -> Iterable[tuple[str, float]]:
        judge, sources = prepared()
        real = []
        for number, (part, source) in enumerate(sources.items()):
            examples, asked = [source[i] for i in range(num)], source.attributes[:num]
            ids = np.stack([example["captions"][i % FULL] for i, example in enumerate(examples)])
            yield from accuracies(part, judge(sample(ids, first=number * num)) == asked)
            images = np.stack([example["x"] for example in examples])
            real.append(judge(np.round((images + 1) * 127.5).astype(np.uint8)) == asked)
        yield from accuracies("real", np.concatenate(real))

    return run


def accuracies(part: str, right: Bool[np.ndarray, "n 4"]) -> Iterable[tuple[str, float]]:
    """The share of images with the right value, for each attribute and for all at once."""
    for name, one in zip((*ATTRIBUTES, "all"), (*right.T, right.all(axis=1)), strict=True):
        yield f"{part}/{name}", float(one.mean())
