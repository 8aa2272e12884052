"""What every metric asks of its arguments: features [n d] of one d, enough of them, and every value finite."""

import numpy as np


def check_sets(least: int, **sets: np.ndarray) -> None:
    """Raise ValueError unless each of these is [n d] with n >= least, all of one d, and every value is finite."""
    for name, features in sets.items():
        if np.ndim(features) != 2 or len(features) < least:
            raise ValueError(f"{name} must be features [n d] with n >= {least}, given shape {np.shape(features)}")
    if len({features.shape[1] for features in sets.values()}) > 1:
        shapes = ", ".join(f"{name} {features.shape}" for name, features in sets.items())
        raise ValueError(f"the sets must have features of one dimension, given {shapes}")
    for name, features in sets.items():
        check_finite(name, features)


def check_finite(name: str, values: np.ndarray) -> None:
    """Raise ValueError, with their number, if some values are infinite or NaN."""
    bad = np.size(values) - np.count_nonzero(np.isfinite(values))
    if bad:
        raise ValueError(f"{bad} of {np.size(values)} values of {name} are not finite")
