"""The Frechet distance: closed forms, symmetry, covariances without full rank, and the ADM evaluator's values."""

from pathlib import Path

import numpy as np
import pytest

from diversedit_jax.metrics.frechet import frechet_distance, moments

GOLDEN = np.load(Path(__file__).parent / "data" / "frechet.npz")  # features, moments, values of the ADM evaluator


def spd(rng, d):
    root = rng.normal(size=(d, d))
    return root @ root.T


def test_moments_are_those_of_numpy():
    features = np.random.default_rng(0).normal(3, 2, (50, 7)).astype(np.float32)
    mean, cov = moments(features)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


def test_gaussians_with_common_axes_have_a_closed_form():
    rng = np.random.default_rng(1)
    axes, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a, b, mean1, mean2 = rng.uniform(0.1, 3, (4, 6))
    wanted = np.sum((mean1 - mean2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    given = frechet_distance(mean1, axes * a @ axes.T, mean2, axes * b @ axes.T)
    np.testing.assert_allclose(given, wanted, rtol=1e-12)


def test_general_covariances_agree_with_the_eigenvalues_of_their_product():
    rng = np.random.default_rng(2)
    c1, c2 = spd(rng, 5), spd(rng, 5)
    wanted = np.trace(c1 + c2) - 2 * np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    np.testing.assert_allclose(frechet_distance(np.zeros(5), c1, np.zeros(5), c2), wanted, rtol=1e-10)
    np.testing.assert_allclose(frechet_distance(np.zeros(5), c2, np.zeros(5), c1), wanted, rtol=1e-10)


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_equal_sets_are_at_distance_zero(n):
    fitted = moments(np.random.default_rng(3).normal(size=(n, 200)) * 10)
    assert 0 <= frechet_distance(*fitted, *fitted) < 1e-6


def test_orthogonal_subspaces_share_nothing():
    c1, c2 = np.diag([4.0, 1, 0, 0]), np.diag([0, 0, 9.0, 2])
    np.testing.assert_allclose(frechet_distance(np.zeros(4), c1, np.zeros(4), c2), 16, rtol=1e-12)


def test_eigenvalues_that_rounding_made_negative_count_as_zero():
    c = np.diag([1.0, -1e-15])
    np.testing.assert_allclose(frechet_distance(np.zeros(2), c, np.ones(2), c), 2, rtol=1e-12)


def test_it_is_the_value_of_the_adm_evaluator():
    value = frechet_distance(*(GOLDEN[k] for k in ("ref_mean", "ref_cov", "samples_mean", "samples_cov")))
    np.testing.assert_allclose(value, GOLDEN["fid"], rtol=1e-6)


def test_it_is_the_value_of_the_adm_evaluator_for_ten_samples_of_64_dimensions():
    features = GOLDEN["singular"]
    value = frechet_distance(*moments(features[:10]), *moments(features[10:]))
    np.testing.assert_allclose(value, GOLDEN["fid_singular"], rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (5,)])
def test_one_sample_has_no_covariance(shape):
    with pytest.raises(ValueError, match=r"n >= 2 samples, given shape \("):
        moments(np.zeros(shape))


def test_values_that_are_not_finite_are_counted():
    with pytest.raises(ValueError, match="2 of 12 values of features are not finite"):
        moments(np.where(np.eye(3, 4) * np.array([1, 1, 0, 0]), np.nan, 1.0))
    with pytest.raises(ValueError, match="1 of 2 values of mean2 are not finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.array([0, np.inf]), np.eye(2))


def test_dimensions_must_agree():
    with pytest.raises(ValueError, match=r"one d, given \(2,\), \(2, 2\) and \(3,\), \(3, 3\)"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="one d"):
        frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(3))
