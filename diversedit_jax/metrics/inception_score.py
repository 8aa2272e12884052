"""Inception Score (IS, arXiv 1606.03498): how sure a classifier is of each image, and how varied its answers are.

exp(mean KL(p(y|x) || p(y))), where p(y|x) is a classifier's and p(y) its mean over the images. It is 1 if all images
look alike, and the number of classes if all answers are sure and evenly spread. It grows with the number of images.
Hence the value is the mean over splits of 5,000 in the order of the file, as in ADM's evaluator. In float64 on the
host.
"""

import numpy as np
from jaxtyping import Float

from diversedit_jax.metrics.checks import check_sets
from diversedit_jax.registry import in_range


def inception_score(probabilities: np.ndarray, split: int = 5000) -> tuple[float, float]:
    """Mean and standard deviation over splits of the score of class probabilities [n k], a row for each image.

    A split is `split` consecutive images. The last may be shorter and counts as much as the others.
    """
    probabilities = np.asarray(probabilities)
    check_sets(1, probabilities=probabilities)
    in_range("split", split, 1)
    in_range("the smallest probability", probabilities.min().item(), 0)
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if len(wrong := np.flatnonzero(np.abs(sums - 1) > 1e-3)):
        raise ValueError(
            f"{len(wrong)} of {len(sums)} rows of probabilities do not sum to 1: row {wrong[0]} to {sums[wrong[0]]:g}"
        )
    parts = [probabilities[start : start + split].astype(np.float64) for start in range(0, len(probabilities), split)]
    scores = [np.exp(entropy(p.mean(axis=0)) - entropy(p).mean()) for p in parts]  # mean KL = H(mean) - mean H
    return float(np.mean(scores)), float(np.std(scores))


def entropy(p: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n"] | np.floating:
    """-sum p log p over the last axis, in nats; 0 log 0 is 0."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def probabilities(logits: np.ndarray) -> Float[np.ndarray, "n k"]:
    """The softmax of logits [n k] over k, in float64."""
    logits = np.asarray(logits, np.float64)
    check_sets(1, logits=logits)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
