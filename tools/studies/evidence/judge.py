"""Score samples on the features of a small classifier, against the held-out images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from diversedit_jax.data.levels import Levels
from diversedit_jax.evaluation import extractors
from diversedit_jax.metrics.frechet import frechet_distance, moments
from diversedit_jax.metrics.kernel_distance import kernel_distance
from diversedit_jax.metrics.precision_recall import precision_recall

SUBSETS = 20  # of the kernel distance


class Judge:
    """The feature network of a size, and what it sees in the held-out images.

    floor: the scores of `num` training images, which a perfect network would have on average.
    """

    def __init__(self, file: Path, train: Levels, held_out: Levels, num: int):
        self.extractor = extractors.make("small_resnet", file=str(file))
        self._weights, self._apply = self.extractor.init(), jax.jit(self.extractor.apply)
        self._reference, logits = self._read(held_out.images)
        self._gaussian = moments(self._reference).gaussian
        self.accuracy = float(np.mean(np.argmax(logits, axis=1) == held_out.labels))
        some = np.random.default_rng(0).permutation(len(train))[:num]
        self.floor = self.scores(train.images[some], train.labels[some])

    def _read(self, images: UInt8[np.ndarray, "n h w c"]) -> tuple[np.ndarray, np.ndarray]:
        size, found = self.extractor.chunk, []
        for begin in range(0, len(images), size):
            chunk = images[begin : begin + size]
            padded = np.pad(chunk, ((0, size - len(chunk)), (0, 0), (0, 0), (0, 0)))
            features = self._apply(self._weights, padded)
            found.append((np.asarray(features.pool)[: len(chunk)], np.asarray(features.logits)[: len(chunk)]))
        pools, logits = zip(*found, strict=True)
        return np.concatenate(pools), np.concatenate(logits)

    def scores(self, images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"]) -> Mapping[str, float]:
        """Return the scores of images that were drawn for these labels."""
        pool, logits = self._read(images)
        few = min(len(pool), len(self._reference))
        precision, recall = precision_recall(self._reference[:few], pool[:few])
        options: dict[str, Any] = {"subsets": SUBSETS, "subset_size": min(1000, few)}
        return {
            "frechet": frechet_distance(*moments(pool).gaussian, *self._gaussian),
            "kid": kernel_distance(self._reference, pool, **options)[0],
            "accuracy": float(np.mean(np.argmax(logits, axis=1) == labels)),
            "precision": precision,
            "recall": recall,
        }
