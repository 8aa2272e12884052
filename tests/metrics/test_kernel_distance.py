"""Kernel distance: the definition pair by pair, no bias, and what subsets are drawn."""

import numpy as np
import pytest

from diversedit_jax.metrics.kernel_distance import kernel_distance, squared_discrepancy


def normal(seed: int, n: int, d: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def literal(x, y) -> float:
    """The estimator without bias of MMD^2 with (x.y / d + 1)^3, pair by pair."""

    def k(u, v):
        return (sum(a * b for a, b in zip(u, v, strict=True)) / len(u) + 1) ** 3

    def within(z):
        return sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * sum(k(u, v) for u in x for v in y) / (len(x) * len(y))


def test_it_is_the_definition_pair_by_pair():
    x, y = normal(0, 7), 2 * normal(1, 5) + 1
    np.testing.assert_allclose(squared_discrepancy(x, y), literal(x, y), rtol=1e-12)


def test_a_subset_of_all_rows_is_the_whole_set_whatever_the_order():
    x, y = normal(0, 8).astype(np.float32), normal(1, 8).astype(np.float32) + 1
    found = kernel_distance(x, y, subsets=3, subset_size=8)
    np.testing.assert_allclose(found, (literal(x.astype(float), y.astype(float)), 0), rtol=1e-10, atol=1e-12)


def test_equal_distributions_are_at_zero_on_average_and_below_it_as_often():
    values = np.array([squared_discrepancy(normal(2 * s, 30), normal(2 * s + 1, 30)) for s in range(400)])
    error = values.std() / np.sqrt(len(values))
    assert abs(values.mean()) < 4 * error, f"mean {values.mean():.2e}, standard error {error:.2e}"
    assert 0.3 < (values < 0).mean() < 0.8


def test_different_distributions_are_apart():
    mean, std = kernel_distance(normal(0, 500), normal(1, 400) + 0.5, subsets=20, subset_size=100)
    assert mean > 3 * std > 0


def test_mean_and_standard_deviation_are_those_of_the_subsets_and_the_seed_chooses_them():
    x, y = normal(0, 60), normal(1, 50)
    assert kernel_distance(x, y, subsets=5, subset_size=20) == kernel_distance(x, y, subsets=5, subset_size=20, seed=0)
    assert kernel_distance(x, y, subsets=5, subset_size=20) != kernel_distance(x, y, subsets=5, subset_size=20, seed=1)
    rng = np.random.default_rng(3)
    values = []
    for _ in range(5):
        rows = [rng.choice(len(features), 20, replace=False) for features in (x, y)]
        values.append(literal(x[rows[0]], y[rows[1]]))
    found = kernel_distance(x, y, subsets=5, subset_size=20, seed=3)
    np.testing.assert_allclose(found, (np.mean(values), np.std(values)), rtol=1e-9)


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match=r"samples must be features \[n d\] with n >= 10, given shape \(9, 4\)"):
        kernel_distance(normal(0, 20), normal(1, 9), subset_size=10)
    with pytest.raises(ValueError, match=r"one dimension d, given reference \(20, 4\), samples \(20, 5\)"):
        kernel_distance(normal(0, 20), normal(1, 20, 5), subset_size=10)
    with pytest.raises(ValueError, match="20 of 80 values of reference are not finite"):
        kernel_distance(normal(0, 20) * [1, 1, np.inf, 1], normal(1, 20), subset_size=10)
    with pytest.raises(ValueError, match="subset_size = 1: must be at least 2"):
        kernel_distance(normal(0, 20), normal(1, 20), subset_size=1)
    with pytest.raises(ValueError, match="subsets = 0: must be at least 1"):
        kernel_distance(normal(0, 20), normal(1, 20), subset_size=10, subsets=0)
