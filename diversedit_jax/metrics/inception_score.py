"""Inception Score (IS, arXiv 1606.03498): how sure a classifier is of each image, and how varied its answers are.

exp(mean KL(p(y|x) || p(y))), where p(y|x) is a classifier's and p(y) its mean over the images. 1 if all images look
alike, the number of classes if they are sure and evenly spread; higher is better. It grows with the number of images,
so the value is the mean over splits of 5,000, in the order of the file, as in ADM's evaluator. In float64 on the host.
"""

import numpy as np
from jaxtyping import Float

from diversedit_jax.metrics.checks import check_sets


def inception_score(probabilities: np.ndarray, split: int = 5000) -> tuple[float, float]:
    """Mean and standard deviation over splits of the score of class probabilities [n k], a row for an image.

    Splits are `split` consecutive images; the last may be shorter and counts as much as the others.
    Raises ValueError if there are no images, split < 1, a value is negative or not finite, or a row does not sum to 1
    within 1e-3.
    """
    probabilities = np.asarray(probabilities)
    check_sets(1, probabilities=probabilities)
    if split < 1:
        raise ValueError(f"split must be at least 1, given {split}")
    if (least := probabilities.min()) < 0:
        raise ValueError(f"probabilities must not be negative, given {least}")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if len(wrong := np.flatnonzero(np.abs(sums - 1) > 1e-3)):
        raise ValueError(
            f"{len(wrong)} of {len(sums)} rows of probabilities do not sum to 1: row {wrong[0]} to {sums[wrong[0]]:g}"
        )
    scores = [
        np.exp(information(probabilities[start : start + split].astype(np.float64)))
        for start in range(0, len(probabilities), split)
    ]
    return float(np.mean(scores)), float(np.std(scores))


def information(probabilities: Float[np.ndarray, "n k"]) -> np.floating:
    """mean KL(p(y|x) || p(y)) in nats, as the entropy of the mean less the mean entropy."""
    return entropy(probabilities.mean(axis=0)) - entropy(probabilities).mean()


def entropy(p: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n"] | np.floating:
    """-sum p log p over the last axis, in nats; 0 log 0 is 0."""
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def probabilities(logits: np.ndarray) -> Float[np.ndarray, "n k"]:
    """The softmax of logits [n k] over k, in float64. Raises ValueError for values that are not finite."""
    logits = np.asarray(logits, np.float64)
    check_sets(1, logits=logits)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
