"""Kernel distance of two sets of features (KID, arXiv 1801.01401), in float64 on the host.

This is the unbiased estimator of the squared maximum mean discrepancy with the kernel k(x, y) = (x.y / d + 1)^3. For
two sets of one distribution it is 0 on average, so it may be negative. It needs fewer samples than the Frechet
distance.
"""

import numpy as np
from jaxtyping import Float

from diversedit_jax.metrics.checks import check_sets
from diversedit_jax.registry import in_range


def kernel_distance(
    reference: np.ndarray, samples: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation over `subsets` of the kernel distance of features [m d] and [n d].

    Each random subset takes `subset_size` rows of both sets, every row at most once. The standard deviation is that of
    one subset. Subsets share rows, so the mean varies by more than this divided by sqrt(subsets).
    """
    reference, samples = (np.asarray(features) for features in (reference, samples))
    in_range("subset_size", subset_size, 2)
    in_range("subsets", subsets, 1)
    check_sets(subset_size, reference=reference, samples=samples)
    rng = np.random.default_rng(seed)

    def subset(features: np.ndarray) -> np.ndarray:
        return features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)

    values = [squared_discrepancy(subset(reference), subset(samples)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def squared_discrepancy(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"]) -> np.floating:
    """The unbiased estimate of MMD^2: no row is compared with itself (Gretton et al., JMLR 2012, Eq. 3)."""
    return mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()


def kernel(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "m n"]:
    """(x.y / d + 1)^3."""
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner  # numpy's ** 3 takes as long as the product of the matrices


def mean_of_pairs(gram: Float[np.ndarray, "n n"]) -> np.floating:
    """The mean over pairs of different rows."""
    n = len(gram)
    return (gram.sum() - np.trace(gram)) / (n * (n - 1))
