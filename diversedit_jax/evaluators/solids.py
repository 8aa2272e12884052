"""Scores of generated solids: is the class right, and are shapes, occupancy and pieces as those of real ones?

The judge knows nothing of the network: the class of a solid is that of the most similar one among 2,048 training
solids, after both have been moved to the middle.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from diversedit_jax.data.solids import NAMES, SHAPE, SIDE, SIZES, Solids
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.metrics.frechet import frechet_distance, moments
from diversedit_jax.registry import in_range

FITTED = 2048  # training solids that the judge knows
COMPONENTS = 32  # of the principal components of voxels, in which solids are compared
CERTAIN = 0.1, 0.9  # a voxel between them is neither empty nor full

Sample = Callable[[np.ndarray], np.ndarray]  # int32 labels [n] -> uint8 volumes [n 16 16 16 1]


def centred(volumes: UInt8[np.ndarray, "n 16 16 16 1"]) -> Float[np.ndarray, "n 4096"]:
    """The occupancy of all voxels, after each solid has been moved by whole voxels so that its centre is in the middle.

    The centre is that of its voxels that are more than half full.
    """
    occupancy = volumes[..., 0] / np.float32(255)
    return np.stack([np.roll(one, moved(one > 0.5), (0, 1, 2)).ravel() for one in occupancy])


def moved(full: Bool[np.ndarray, "16 16 16"]) -> tuple[int, ...]:
    """By how many voxels a solid must be moved along each axis."""
    places = np.argwhere(full)
    return tuple(np.round((SIDE - 1) / 2 - places.mean(axis=0)).astype(int).tolist()) if len(places) else (0, 0, 0)


def statistics(volumes: UInt8[np.ndarray, "n 16 16 16 1"]) -> Iterable[tuple[str, float]]:
    """Statistics of occupancy that need no real solids, see `make`."""
    occupancy = volumes[..., 0] / 255
    low, high = CERTAIN
    yield "occupancy", float(occupancy.mean())
    yield "undecided", float(((occupancy > low) & (occupancy < high)).mean())
    yield "one_piece", float(np.mean([in_one_piece(volume > 0.5) for volume in occupancy]))


def in_one_piece(full: Bool[np.ndarray, "d h w"]) -> bool:
    """Whether there are full voxels and all are connected: by faces, edges or corners."""
    _, pieces = ndimage.label(full, np.ones((3, 3, 3)))
    return pieces == 1


class Judge(NamedTuple):
    """The principal components of centred solids, a classifier of them, and their Gaussian among real solids."""

    components: PCA
    classifier: KNeighborsClassifier
    real: tuple[np.ndarray, np.ndarray]

    @classmethod
    def fitted(cls, volumes: UInt8[np.ndarray, "n 16 16 16 1"], labels: Int[np.ndarray, " n"]) -> "Judge":
        """A judge that knows these solids."""
        components = PCA(COMPONENTS, random_state=0)
        known = components.fit_transform(centred(volumes))
        return cls(components, KNeighborsClassifier(1).fit(known, labels), moments(known).gaussian)

    def __call__(
        self, volumes: UInt8[np.ndarray, "n 16 16 16 1"], labels: Int[np.ndarray, " n"]
    ) -> Iterable[tuple[str, float]]:
        """All scores of volumes that shall have these labels, see `make`."""
        given = self.components.transform(centred(volumes))
        yield "accuracy", float(self.classifier.score(given, labels))
        yield "frechet", frechet_distance(*moments(given).gaussian, *self.real)
        yield from statistics(volumes)


def real_solids(source: Solids, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The first solids of a split as samples come, uint8 [n 16 16 16 1], and their labels, int32 [n]."""
    examples = [source[i] for i in range(num)]
    volumes = np.stack([np.round((example["x"] + 1) * 127.5).astype(np.uint8) for example in examples])
    return volumes, np.stack([example["y"] for example in examples])


def make(spec: SampleSpec, *, num: int = 512) -> Callable[[Sample], Iterable[tuple[str, float]]]:
    """The evaluator: `run(sample)` draws `num` solids with balanced labels and yields names and values.

    num: of samples.
    accuracy: of the classifier on the samples.
    frechet: Frechet distance between samples and 2,048 training solids, of 32 principal components of occupancy after
        they have been moved to the middle; lower is better.
    occupancy: of a voxel, mean. undecided: share of voxels that are neither empty nor full, occupancy 0.1 to 0.9.
    one_piece: share of samples whose voxels above 0.5 all touch each other, by faces, edges or corners.
    real/NAME: each of these, of `num` held-out solids instead of samples.
    Raises ConfigError if the data of the run are not `data.solids`.
    """
    in_range("solids: num", num, 2, SIZES["test"])
    train = spec.judged("solids", Solids, "volumes", SHAPE)

    @cache  # fit once, at the first run
    def prepared() -> tuple[Judge, dict[str, float]]:
        judge = Judge.fitted(*real_solids(train, FITTED))
        return judge, dict(judge(*real_solids(spec.data("test").source, num)))

    def run(sample: Sample) -> Iterable[tuple[str, float]]:
        judge, real = prepared()
        labels = np.arange(num, dtype=np.int32) % len(NAMES)
        yield from judge(sample(labels), labels)
        yield from ((f"real/{name}", value) for name, value in real.items())

    return run
