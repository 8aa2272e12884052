"""Scores of generated solids: is the class right, and are size, surface and pieces as those of real ones?

The judge knows nothing of the network. It describes a solid by 16 numbers that no rotation changes, and its classifier
is a support vector machine.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from diversedit_jax.data.solids import NAMES, SHAPE, SIZES, Solids
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.metrics.frechet import frechet_distance, moments
from diversedit_jax.registry import in_range

FITTED = 2048  # training solids that the judge knows
PLACES = np.indices(SHAPE[:3]).reshape(3, -1).T.astype(float)  # of all voxels
BINS, FARTHEST = 10, 1.0  # of the distances from the centre, in cube roots of the volume
CERTAIN = 0.1, 0.9  # a voxel between them is neither empty nor full

Sample = Callable[[np.ndarray], np.ndarray]  # int32 labels [n] -> uint8 volumes [n 16 16 16 1]


def features(volumes: UInt8[np.ndarray, "n 16 16 16 1"]) -> Float[np.ndarray, "n 16"]:
    """The description of each volume, see `described`."""
    return np.stack([described(volume[..., 0] / 255) for volume in volumes])


def described(occupancy: Float[np.ndarray, "16 16 16"]) -> Float[np.ndarray, " 16"]:
    """Numbers that depend on shape and size, not on place and rotation, except by the grid.

    A voxel less than a quarter full counts as empty, one more than three quarters full as full. Lengths are in cube
    roots of the volume: the three variances along the principal axes, the third moment, the shares of the volume within
    10 distances from the centre, the surface; then the cube root of the volume, in voxels.
    """
    occupancy = np.clip(2 * occupancy - 0.5, 0, 1)  # faint noise in all voxels would weigh as much as a solid
    volume = max(occupancy.sum(), 1.0)  # nothing at all has a description, too
    length = np.cbrt(volume)
    weights = occupancy.ravel() / volume
    offsets = (PLACES - weights @ PLACES) / length
    squares = (offsets**2).sum(axis=1)
    variances = np.linalg.eigvalsh((weights * offsets.T) @ offsets)
    third = np.linalg.norm((weights * squares) @ offsets)
    within = np.histogram(np.sqrt(squares), BINS, (0, FARTHEST), weights=weights)[0].cumsum()
    surface = np.sqrt(sum(slope**2 for slope in np.gradient(occupancy))).sum() / length**2
    return np.array([*variances, third, *within, surface, length])


def statistics(volumes: UInt8[np.ndarray, "n 16 16 16 1"]) -> Iterable[tuple[str, float]]:
    """Statistics of occupancy that need no real solids, see `make`."""
    occupancy = volumes[..., 0] / 255
    low, high = CERTAIN
    yield "occupancy", float(occupancy.mean())
    yield "undecided", float(((occupancy > low) & (occupancy < high)).mean())
    yield "one_piece", float(np.mean([in_one_piece(volume > 0.5) for volume in occupancy]))


def in_one_piece(full: Bool[np.ndarray, "d h w"]) -> bool:
    """Whether there are full voxels and all are connected: by faces, edges or corners."""
    full = np.pad(full, 1)  # so that rolling never leaves the grid
    reached, grown = np.zeros_like(full), np.zeros_like(full)
    grown.flat[full.argmax()] = full.any()
    while (grown != reached).any():
        reached = grown
        for axis in range(3):
            grown = grown | np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
        grown &= full
    return bool(reached.any() and (reached == full).all())


class Judge(NamedTuple):
    """A classifier of features, and the Gaussian of standardised features of real solids."""

    classifier: Pipeline
    real: tuple[np.ndarray, np.ndarray]

    @classmethod
    def fitted(cls, volumes: UInt8[np.ndarray, "n 16 16 16 1"], labels: Int[np.ndarray, " n"]) -> "Judge":
        """A judge that knows these solids."""
        known = features(volumes)
        classifier = make_pipeline(StandardScaler(), SVC(C=10)).fit(known, labels)
        return cls(classifier, moments(classifier[0].transform(known)).gaussian)

    def __call__(
        self, volumes: UInt8[np.ndarray, "n 16 16 16 1"], labels: Int[np.ndarray, " n"]
    ) -> Iterable[tuple[str, float]]:
        """All scores of volumes that shall have these labels, see `make`."""
        given = features(volumes)
        yield "accuracy", float(self.classifier.score(given, labels))
        yield "frechet", frechet_distance(*moments(self.classifier[0].transform(given)).gaussian, *self.real)
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
    frechet: Frechet distance between samples and 2,048 training solids, of standardised features; lower is better.
    occupancy: of a voxel, mean. undecided: share of voxels that are neither empty nor full, occupancy 0.1 to 0.9.
    one_piece: share of samples whose voxels above 0.5 all touch each other, by faces, edges or corners.
    real/NAME: each of these, of `num` held-out solids instead of samples.
    Raises ConfigError if the data of the run are not `data.solids`.
    """
    in_range("solids: num", num, 2, SIZES["test"])
    if spec.shape != SHAPE:
        raise ConfigError(f"solids: the samples are {spec.shape or 'latents'}, wanted volumes {SHAPE}")
    train = spec.data("train").source
    if not isinstance(train, Solids):
        raise ConfigError("solids: the run has other data: it judges config.data.name = 'solids'")

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
