"""Judges samples of digits: does an independent classifier see the class, and how far are they from real ones?"""

import functools
from collections.abc import Callable, Iterable

import numpy as np
from sklearn.svm import SVC

from diversedit_jax.data import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.metrics.frechet import frechet_distance, moments
from diversedit_jax.registry import in_range

# int32 labels [n] -> uint8 images [n 8 8 1]
Sample = Callable[[np.ndarray], np.ndarray]


def to_levels(images: np.ndarray, num: int) -> np.ndarray:
    """uint8 images [n 8 8 1], 0 .. 255, rounded to the 17 levels of the data, 0 .. 16."""
    images = np.asarray(images)
    if images.shape != (num, *digits.SHAPE):
        raise ValueError(f"samples have shape {images.shape}, wanted {(num, *digits.SHAPE)}")
    if images.dtype != np.uint8:
        finite = np.isfinite(images.astype(np.float64)).all()
        raise ValueError(f"samples are {images.dtype}{'' if finite else ' and not all finite'}, wanted uint8")
    return np.round(images * (digits.MAX_LEVEL / 255))


def flat(levels: np.ndarray) -> np.ndarray:
    """float64 [n 64] in [-1, 1] of levels [n 8 8 1]."""
    return levels.reshape(len(levels), -1) / (digits.MAX_LEVEL / 2) - 1


def make(
    spec: SampleSpec, *, num: int = 1000, data_dir: str | None = None
) -> Callable[[Sample], Iterable[tuple[str, float]]]:
    """The evaluator: `run(sample)` draws `num` images with balanced labels and yields names and values.

    accuracy: the share of samples in which a support vector machine, fitted to the training digits, sees the
    label asked for; classifier_heldout_accuracy: its share on the 360 held-out digits, about 0.99.
    frechet: the Frechet distance of samples and held-out digits, as 64 pixels in [-1, 1]; lower is better;
    frechet_floor: that of training and held-out digits, about 0.41.
    `run` raises ValueError if `sample` does not return uint8 images [num 8 8 1]. data_dir: as in `data.digits`.
    """
    if spec.shape != digits.SHAPE:
        raise ConfigError(f"digits: the samples must be images {digits.SHAPE}, and are {spec.shape or 'latents'}")
    in_range("digits: num", num, 2)

    @functools.cache  # fitted at the first run, once
    def judge():
        (train, train_labels), (test, test_labels) = (digits.levels(split, data_dir) for split in ("train", "test"))
        classifier = SVC(C=10).fit(flat(train), train_labels)
        real = moments(flat(test)).gaussian
        constants = {
            "classifier_heldout_accuracy": classifier.score(flat(test), test_labels),
            "frechet_floor": frechet_distance(*moments(flat(train)).gaussian, *real),
        }
        return classifier, real, constants

    def run(sample: Sample) -> Iterable[tuple[str, float]]:
        labels = np.arange(num, dtype=np.int32) % digits.NUM_CLASSES
        samples = flat(to_levels(sample(labels), num))
        classifier, real, constants = judge()
        yield "accuracy", float(classifier.score(samples, labels))
        yield "frechet", frechet_distance(*moments(samples).gaussian, *real)
        yield from constants.items()

    return run
