"""Kernel distance of two sets of features (KID, arXiv 1801.01401), in float64 on the host.

The squared maximum mean discrepancy with the kernel k(x, y) = (x.y / d + 1)^3, by the estimator without bias: 0 on
average for two sets of one distribution, and so as often below 0 as above. It needs fewer samples than the Frechet
distance. The value is the mean over random subsets.
"""

import numpy as np
from jaxtyping import Float

from diversedit_jax.metrics.checks import check_sets


def kernel_distance(
    reference: np.ndarray, samples: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over `subsets` of the kernel distance of features [m d] and [n d].

    Each subset takes `subset_size` rows of both, every row at most once. The standard deviation is that of one subset;
    subsets share rows, so the mean varies by more than its `subsets`-th root.
    Raises ValueError if a set has fewer rows than a subset, subset_size < 2, subsets < 1, the dimensions differ or a
    value is not finite.
    """
    reference, samples = (np.asarray(features) for features in (reference, samples))
    if subset_size < 2 or subsets < 1:
        raise ValueError(f"subset_size must be at least 2 and subsets 1, given {subset_size} and {subsets}")
    check_sets(subset_size, reference=reference, samples=samples)
    rng = np.random.default_rng(seed)

    def subset(features: np.ndarray) -> np.ndarray:
        return features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)

    values = [squared_discrepancy(subset(reference), subset(samples)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def squared_discrepancy(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"]) -> np.floating:
    """The estimate of MMD^2 without bias: no row is compared with itself (Gretton et al., JMLR 2012, Eq. 3)."""
    return mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()


def kernel(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "m n"]:
    """(x.y / d + 1)^3."""
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner  # numpy's ** 3 takes as long as the product of the matrices


def mean_of_pairs(gram: Float[np.ndarray, "n n"]) -> np.floating:
    """The mean over pairs of different rows."""
    n = len(gram)
    return (gram.sum() - np.trace(gram)) / (n * (n - 1))
