"""Checks of the arguments of metrics."""

import numpy as np


def check_sets(least: int, **sets: np.ndarray) -> None:
    """Raise ValueError unless all sets are [n d] with n >= least and one d, and all values are finite."""
    for name, features in sets.items():
        if np.ndim(features) != 2 or len(features) < least:
            raise ValueError(f"{name} must be features [n d] with n >= {least}, given shape {np.shape(features)}")
    if len({features.shape[1] for features in sets.values()}) > 1:
        shapes = ", ".join(f"{name} {features.shape}" for name, features in sets.items())
        raise ValueError(f"the sets must have one dimension d, given {shapes}")
    check_finite(**sets)


def check_finite(**arrays: np.ndarray) -> None:
    """Raise ValueError if some values are infinite or NaN."""
    for name, values in arrays.items():
        if bad := np.count_nonzero(~np.isfinite(values)):
            raise ValueError(f"{bad} of {np.size(values)} values of {name} are not finite")
