"""Scores of generated digits: does a classifier see the right class, and how far are they from real digits?"""

import functools
from collections.abc import Callable, Iterable

import numpy as np
from sklearn.svm import SVC

from diversedit_jax.data import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.metrics.frechet import frechet_distance, moments
from diversedit_jax.registry import MANY, in_range

Sample = Callable[[np.ndarray], np.ndarray]  # int32 labels [n] -> uint8 images [n 8 8 1]


def flat(levels: np.ndarray) -> np.ndarray:
    """Levels [n 8 8 1] as pixels, float64 [n 64] in [-1, 1]."""
    return levels.reshape(len(levels), -1) / (digits.MAX_LEVEL / 2) - 1


def make(
    spec: SampleSpec, *, num: int = 1000, data_dir: str | None = None
) -> Callable[[Sample], Iterable[tuple[str, float]]]:
    """The evaluator: `run(sample)` draws `num` images with balanced labels and yields names and values.

    num: of samples.
    accuracy: of a support vector machine, fitted to the training digits, on the samples.
    classifier_heldout_accuracy: the same on the 360 held-out digits, about 0.99.
    frechet: Frechet distance between samples and held-out digits, as 64 pixels in [-1, 1]; lower is better.
    frechet_floor: the same between training and held-out digits, about 0.41.
    `run` raises ValueError if `sample` does not return uint8 images [num 8 8 1]. data_dir: as in `data.digits`.
    """
    if spec.shape != digits.SHAPE:
        raise ConfigError(f"digits: the samples are {spec.shape or 'latents'}, wanted images {digits.SHAPE}")
    in_range("digits: num", num, 2, MANY)
    (train, train_labels), (test, test_labels) = (digits.levels(split, data_dir) for split in ("train", "test"))

    @functools.cache  # fit once, at the first run
    def judge():
        classifier = SVC(C=10).fit(flat(train), train_labels)
        real = moments(flat(test)).gaussian
        constants = {
            "classifier_heldout_accuracy": classifier.score(flat(test), test_labels),
            "frechet_floor": frechet_distance(*moments(flat(train)).gaussian, *real),
        }
        return classifier, real, constants

    def run(sample: Sample) -> Iterable[tuple[str, float]]:
        labels = np.arange(num, dtype=np.int32) % digits.NUM_CLASSES
        images = sample(labels)
        if images.shape != (num, *digits.SHAPE) or images.dtype != np.uint8:
            raise ValueError(f"samples are {images.dtype} {images.shape}, wanted uint8 {(num, *digits.SHAPE)}")
        samples = flat(np.round(images * (digits.MAX_LEVEL / 255)))  # to the 17 levels of the data
        classifier, real, constants = judge()
        yield "accuracy", float(classifier.score(samples, labels))
        yield "frechet", frechet_distance(*moments(samples).gaussian, *real)
        yield from constants.items()

    return run
