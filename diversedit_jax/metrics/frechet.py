"""Frechet distance between Gaussians fitted to two sets of features (FID, arXiv 1706.08500), in float64 on the host.

|mean1 - mean2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With C = F F^T, the trace of (C1 C2)^(1/2) is the sum of the singular
values of F1^T F2. This is exact to rounding, also for covariances without full rank (fewer samples than dimensions),
where the matrix square root of scipy turns complex.

Features may come in batches of any size: `functools.reduce(merged, map(moments, batches))` has the moments of all.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diversedit_jax.metrics.checks import check_finite, check_sets
from diversedit_jax.registry import in_range


class Moments(NamedTuple):
    """The Gaussian of a set of features, in a form that can be merged: float64, on the host."""

    count: int  # n samples
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]  # sum over samples of the outer product of (sample - mean) with itself

    @property
    def covariance(self) -> Float[np.ndarray, "d d"]:
        """The unbiased estimate, scatter / (n - 1)."""
        return self.scatter / (in_range("samples of a covariance", self.count, 2) - 1)

    @property
    def gaussian(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
        """The mean and the covariance, as `frechet_distance` takes them."""
        return self.mean, self.covariance


def moments(features: np.ndarray) -> Moments:
    """Moments of one batch of features [n d], n >= 1. Larger batches are quicker to merge."""
    features = np.asarray(features, np.float64)
    check_sets(1, features=features)
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merged(a: Moments, b: Moments) -> Moments:
    """Moments of two batches together (Chan, Golub and LeVeque, 1979).

    Only deviations from means are squared, so a large mean costs no digits.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of {len(a.mean)} and {len(b.mean)} dimensions cannot be merged")
    count = a.count + b.count
    apart = b.mean - a.mean
    scatter = np.outer(apart * (a.count * b.count / count), apart)
    scatter += a.scatter
    scatter += b.scatter
    return Moments(count, a.mean + apart * (b.count / count), scatter)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The squared Frechet distance of two Gaussians, means [d] and covariances [d d]; at least 0."""
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    if mean1.ndim != 1 or mean1.shape != mean2.shape or not cov1.shape == cov2.shape == (len(mean1),) * 2:
        given = f"{mean1.shape}, {cov1.shape} and {mean2.shape}, {cov2.shape}"
        raise ValueError(f"means [d] and covariances [d d] must have one d, given {given}")
    check_finite(mean1=mean1, cov1=cov1, mean2=mean2, cov2=cov2)
    overlap = np.linalg.svd(factor(cov1).T @ factor(cov2), compute_uv=False).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(float(distance), 0.0)  # rounding may leave -1e-12 for equal arguments


def factor(cov: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """F with F F^T = cov: by Cholesky if cov has full rank, else by r eigenvectors.

    Eigenvalues as small as rounding count as 0. Otherwise their roots would add up: 1e-16 has the root 1e-8.
    """
    try:
        return np.linalg.cholesky(cov)  # a sixth of the time
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cov)
        real = values > len(values) * np.finfo(np.float64).eps * values[-1]
        return vectors[:, real] * np.sqrt(values[real])
