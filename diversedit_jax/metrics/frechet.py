"""Frechet distance between Gaussians fitted to two sets of features (FID, arXiv 1706.08500), in float64 on the host.

|mean1 - mean2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With C = F F^T, from the eigenvectors and square roots of the
eigenvalues of each covariance, the trace of (C1 C2)^(1/2) is the sum of the singular values of F1^T F2: no square root
of a product that is not symmetric, and exact to rounding also for covariances without full rank (fewer samples than
dimensions), where the matrix square root of scipy turns complex.
"""

import numpy as np


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d d] (divided by n - 1) of features [n d], in float64.

    Raises ValueError for fewer than two samples or values that are not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"the covariance needs features [n d] of n >= 2 samples, given shape {features.shape}")
    check_finite("features", features)
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The squared Frechet distance of two Gaussians, means [d] and covariances [d d]; at least 0.

    Raises ValueError if the dimensions differ or a value is not finite.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    if mean1.ndim != 1 or mean1.shape != mean2.shape or not cov1.shape == cov2.shape == (len(mean1),) * 2:
        raise ValueError(
            "means [d] and covariances [d d] must have one d, "
            f"given {mean1.shape}, {cov1.shape} and {mean2.shape}, {cov2.shape}"
        )
    for name, values in {"mean1": mean1, "cov1": cov1, "mean2": mean2, "cov2": cov2}.items():
        check_finite(name, values)
    overlap = np.linalg.svd(factor(cov1).T @ factor(cov2), compute_uv=False).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(float(distance), 0.0)  # rounding may leave -1e-12 for equal arguments


def factor(cov: np.ndarray) -> np.ndarray:
    """F [d d] with F F^T = cov; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.clip(values, 0, None))


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise ValueError, with their number, if some values are infinite or NaN."""
    bad = np.size(values) - np.count_nonzero(np.isfinite(values))
    if bad:
        raise ValueError(f"{bad} of {values.size} values of {name} are not finite")
