"""The Frechet distance: closed forms, symmetry, covariances without full rank, and the ADM evaluator's values.
The moments under it: those of numpy, however the features are cut into batches."""

from functools import reduce

import numpy as np
import pytest

from diversedit_jax.metrics.frechet import factor, frechet_distance, merged, moments
from tests import DATA

GOLDEN = np.load(DATA / "adm_metrics.npz")  # features and the ADM evaluator's values


def spd(rng, d):
    root = rng.normal(size=(d, d))
    return root @ root.T


def gaussian(features):
    fitted = moments(features)
    return fitted.mean, fitted.covariance


def test_moments_are_those_of_numpy():
    features = np.random.default_rng(0).normal(3, 2, (50, 7)).astype(np.float32)
    fitted = moments(features)
    assert fitted.mean.dtype == fitted.scatter.dtype == fitted.covariance.dtype == np.float64
    assert fitted.count == 50
    np.testing.assert_allclose(fitted.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(fitted.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_batches_of_any_size_have_the_moments_of_all(offset):
    features = np.random.default_rng(0).normal(offset, 1, (1000, 7))
    batches = np.split(features, [1, 2, 300, 557, 990])
    found = reduce(merged, map(moments, batches))
    assert found.count == 1000
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.covariance, moments(features).covariance, rtol=0, atol=1e-10)


def test_the_order_of_batches_changes_nothing():
    parts = [moments(np.random.default_rng(n).normal(5, n, (n, 4))) for n in (1, 7, 50)]
    one, other = reduce(merged, parts), merged(parts[2], merged(parts[0], parts[1]))
    np.testing.assert_allclose(one.mean, other.mean, rtol=1e-13)
    np.testing.assert_allclose(one.scatter, other.scatter, rtol=1e-12)


def test_moments_of_different_dimensions_cannot_be_merged():
    with pytest.raises(ValueError, match="moments of 3 and 4 dimensions"):
        merged(moments(np.ones((2, 3))), moments(np.ones((2, 4))))


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


@pytest.mark.parametrize("n", [2, 10, 200, 1000])
def test_equal_sets_are_at_distance_zero(n):
    fitted = gaussian(np.random.default_rng(3).normal(size=(n, 200)) * 10)
    assert 0 <= frechet_distance(*fitted, *fitted) < 1e-6


@pytest.mark.parametrize(("n1", "n2"), [(20, 30), (20, 500), (99, 100), (101, 102)])
def test_with_fewer_samples_than_dimensions_it_is_what_the_samples_say(n1, n2):
    # The centred features are themselves a factor of their covariance.
    rng = np.random.default_rng(4)
    sets = [rng.normal(size=(n, 100)) * np.logspace(0, -3, 100) for n in (n1, n2)]
    means = [x.mean(axis=0) for x in sets]
    f1, f2 = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in sets)
    overlap = np.linalg.svd(f1 @ f2.T, compute_uv=False).sum()
    wanted = np.sum((means[0] - means[1]) ** 2) + np.sum(f1**2) + np.sum(f2**2) - 2 * overlap
    np.testing.assert_allclose(frechet_distance(*gaussian(sets[0]), *gaussian(sets[1])), wanted, rtol=1e-12)


@pytest.mark.parametrize(("n", "rank"), [(10, 9), (100, 20)])
def test_a_factor_has_the_rank_of_the_covariance(n, rank):
    cov = moments(np.random.default_rng(5).normal(size=(n, 20))).covariance
    assert factor(cov).shape == (20, rank)
    np.testing.assert_allclose(factor(cov) @ factor(cov).T, cov, atol=1e-14)


def test_orthogonal_subspaces_share_nothing():
    c1, c2 = np.diag([4.0, 1, 0, 0]), np.diag([0, 0, 9.0, 2])
    np.testing.assert_allclose(frechet_distance(np.zeros(4), c1, np.zeros(4), c2), 16, rtol=1e-12)


def test_points_are_at_the_distance_of_their_means():
    points = np.zeros(3), np.zeros((3, 3)), np.ones(3), np.zeros((3, 3))
    assert frechet_distance(*points) == 3


def test_eigenvalues_that_rounding_made_negative_count_as_zero():
    c = np.diag([1.0, -1e-15])
    np.testing.assert_allclose(frechet_distance(np.zeros(2), c, np.ones(2), c), 2, rtol=1e-12)


def test_it_is_the_value_of_the_adm_evaluator():
    value = frechet_distance(*gaussian(GOLDEN["ref"]), *gaussian(GOLDEN["samples"]))
    np.testing.assert_allclose(value, GOLDEN["fid"], rtol=1e-6)


def test_it_is_the_value_of_the_adm_evaluator_for_ten_samples_of_64_dimensions():
    features = GOLDEN["singular"]
    value = frechet_distance(*gaussian(features[:10]), *gaussian(features[10:]))
    np.testing.assert_allclose(value, GOLDEN["fid_singular_first10_vs_last10"], rtol=1e-6)


def test_one_sample_has_moments_but_no_covariance():
    one = moments(np.ones((1, 4)))
    with pytest.raises(ValueError, match="samples of a covariance = 1: must be at least 2"):
        _ = one.covariance
    assert merged(one, one).covariance.shape == (4, 4)


@pytest.mark.parametrize("shape", [(0, 4), (5,), (2, 3, 4)])
def test_moments_are_of_a_set_of_features(shape):
    with pytest.raises(ValueError, match=r"n >= 1, given shape \("):
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
