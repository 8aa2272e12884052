"""CKA: the numbers of an independent computation, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.metrics import similarity
from diversedit_jax.metrics.similarity import (
    cka,
    hsic_biased,
    hsic_unbiased,
    linear,
    off_diagonal_mean,
    polynomial,
    rbf,
)


def features(block: int) -> np.ndarray:
    """The oracle's features F_l[n, t, k], flattened to 8 examples of 8 channels."""
    n, t, k = np.ogrid[:2, :4, :8]
    values = np.sin(0.07 * (block + 1) * (k + 1) + 0.37 * n + 0.11 * t * (block + 1))
    return (values + 0.3 * np.cos(0.05 * k * t + 0.2 * block)).reshape(8, 8)


def rows(seed: int, n: int = 64, p: int = 5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((n, p)), jnp.float32)


@pytest.mark.parametrize(
    ("kernel", "hsic", "wanted"),
    [
        (linear, hsic_biased, 0.8576965095),
        (linear, hsic_unbiased, 0.8547346847),
        (rbf, hsic_biased, 0.8990514925),
        (lambda x: rbf(x, multiplier=0.5), hsic_biased, 0.7855223509),
    ],
)
def test_equals_the_independent_computation_in_float64(kernel, hsic, wanted):
    with jax.enable_x64(True):
        found = cka([jnp.asarray(features(2)), jnp.asarray(features(9))], kernel, hsic)
        np.testing.assert_allclose(found[0, 1], wanted, atol=1e-9)
        np.testing.assert_allclose(jnp.diagonal(found), 1, atol=1e-12)


@pytest.mark.parametrize("kernel", similarity.KERNELS.values(), ids=similarity.KERNELS)
@pytest.mark.parametrize("hsic", similarity.HSICS.values(), ids=similarity.HSICS)
def test_symmetric_with_ones_on_the_diagonal(kernel, hsic):
    found = cka([rows(0), rows(1) ** 3, rows(0) + 0.1 * rows(2)], kernel, hsic)
    np.testing.assert_allclose(found, found.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jnp.diagonal(found), 1, rtol=1e-5)
    assert found[0, 2] > 0.9 > found[0, 1], "what is nearly the same is more alike than what is not"


@pytest.mark.parametrize("kernel", [linear, rbf])
def test_a_rotation_and_a_scale_change_nothing_but_a_stretch_does(kernel):
    rotation = jnp.linalg.qr(rows(3, 5, 5))[0]
    turned, stretched = 7 * rows(0) @ rotation + 2, rows(0) * jnp.array([9.0, 1, 1, 1, 1])
    found = cka([rows(0), turned, stretched], kernel)
    np.testing.assert_allclose(found[0, 1], 1, rtol=1e-4)
    assert found[0, 2] < 0.95


def test_only_the_unbiased_estimator_sees_nothing_in_noise():
    # 16 examples of 512 channels: the biased one finds most of a similarity
    noise = [rows(seed, 16, 512) for seed in range(8)]
    assert off_diagonal_mean(cka(noise)) > 0.8
    assert abs(off_diagonal_mean(cka(noise, hsic=hsic_unbiased))) < 0.05


def test_polynomial_of_degree_one_is_linear():
    found = cka([rows(0), rows(0) ** 3], lambda x: polynomial(x, degree=1))
    np.testing.assert_allclose(found, cka([rows(0), rows(0) ** 3]), rtol=1e-4)


def test_off_diagonal_mean_leaves_the_diagonal_out():
    assert off_diagonal_mean(jnp.array([[1.0, 0.2], [0.4, 1.0]])) == pytest.approx(0.3)


def test_too_few_examples_are_an_error():
    with pytest.raises(ValueError, match="at least 4 examples, given 3"):
        cka([rows(0, 3), rows(1, 3)], hsic=hsic_unbiased)
