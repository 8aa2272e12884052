"""The statistics of the study: ratios to the baseline, paired by seed, with 95% intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """An estimate and its 95% interval. NaN bounds: one seed has no interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if np.isfinite(self.low) else "")


def mean(values: Sequence[float]) -> Interval:
    """Return the mean and Student's interval."""
    values, n = np.asarray(values, float), len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return Interval(*(float(values.mean() + shift) for shift in (0, -half, half)))


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Return the geometric mean of value / baseline over the seeds that both have. Intervals are those of the logs.

    values, baseline: seed -> a positive number.
    """
    seeds = sorted(values.keys() & baseline.keys())
    return Interval(*map(float, np.exp(mean([np.log(values[seed] / baseline[seed]) for seed in seeds]))))


def at_time(seconds: Sequence[float], values: Sequence[float], when: float) -> float:
    """Return the value at a time, between measured ones: linear in the logs of both. NaN before the first."""
    if when < seconds[0] * (1 - 1e-9):
        return float("nan")
    return float(np.exp(np.interp(np.log(when), np.log(seconds), np.log(values))))
