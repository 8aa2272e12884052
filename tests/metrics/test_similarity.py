"""CKA and its relatives, ranks and scores: numbers of independent computations, and invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.metrics import similarity
from diversedit_jax.metrics.similarity import (
    centred_cosine,
    channel_usage,
    channels_used,
    cka,
    cknna,
    diversity,
    effective_rank,
    hsic_biased,
    hsic_of,
    hsic_unbiased,
    linear,
    mean_cosine,
    mean_share,
    normalised,
    off_diagonal_mean,
    participation_ratio,
    polynomial,
    procrustes,
    rbf,
    token_cosine,
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


@pytest.mark.parametrize("hsic", similarity.HSICS.values(), ids=similarity.HSICS)
def test_a_large_mean_costs_no_digits(hsic):
    """Tokens share most of what they are: the position table, the time. CKA sees what differs, in float32 too."""
    blocks = [rows(0), rows(0) + rows(1)]
    shifted = [100 + 0.1 * block for block in blocks]
    with jax.enable_x64(True):
        wanted = cka([jnp.asarray(np.asarray(block, np.float64)) for block in shifted], hsic=hsic)
    np.testing.assert_allclose(cka(shifted, hsic=hsic), wanted, atol=2e-5)


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
    with pytest.raises(ValueError, match="examples of the unbiased estimator of HSIC = 3: must be at least 4"):
        cka([rows(0, 3), rows(1, 3)], hsic=hsic_unbiased)


def far_from_alike(n=40):
    """Three representations of n examples: two related, one of another width."""
    return [rows(0, n), rows(0, n) + 0.5 * rows(1, n), rows(2, n, 7)]


@pytest.mark.parametrize("unbiased", [True, False])
def test_cknna_is_what_its_definition_says(unbiased):
    n, nearest = 40, 6
    grams = [np.asarray(x @ x.T, np.float64) for x in far_from_alike(n)]

    def hsic(k, m):
        if not unbiased:
            h = np.eye(n) - 1 / n
            return np.trace(k @ h @ m @ h)
        k, m, ones = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
        terms = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * ones @ k @ m @ ones
        return terms / (n * (n - 3))

    def neighbours(k):
        mask = np.zeros((n, n))
        for i in range(n):
            order = [j for j in np.argsort(-k[i]) if not (unbiased and j == i)]
            mask[i, order[:nearest]] = 1
        return mask

    def aligned(a, b):
        mask = neighbours(a) * neighbours(b)
        return hsic(mask * a, mask * b)

    wanted = [[aligned(a, b) / np.sqrt(aligned(a, a) * aligned(b, b)) for b in grams] for a in grams]
    np.testing.assert_allclose(cknna(far_from_alike(n), nearest, unbiased), wanted, rtol=1e-4, atol=1e-5)


def test_cknna_of_all_neighbours_is_unbiased_cka():
    np.testing.assert_allclose(
        cknna(far_from_alike(), nearest=39), cka(far_from_alike(), hsic=hsic_unbiased), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="nearest neighbours of 40 examples = 40: must be at least 2 and at most 39"):
        cknna(far_from_alike(), nearest=40)


def test_procrustes_sees_a_rotation_and_its_formula():
    a, b = (np.asarray(x, np.float64) for x in (rows(0), rows(1)))
    turned = jnp.asarray(7 * rows(0) @ jnp.linalg.qr(rows(3, 5, 5))[0] + 2)
    found = procrustes([rows(0), rows(1), turned])
    np.testing.assert_allclose(jnp.diagonal(found), 1, rtol=1e-6)
    np.testing.assert_allclose(found[0, 2], 1, rtol=1e-5)
    a, b = (x - x.mean(0) for x in (a, b))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    u, _, v = np.linalg.svd(a.T @ b)  # the best rotation; distance^2 = 2 - 2 similarity
    np.testing.assert_allclose(2 - 2 * found[0, 1], np.sum((a @ (u @ v) - b) ** 2), rtol=1e-4)


def test_minibatches_add_up_to_the_whole_on_average():
    """Unbiased in every batch: the mean over batches of 8 is that of all 512, up to chance."""
    batches = [[rows(seed, 8), rows(seed, 8) + rows(seed + 1000, 8)] for seed in range(64)]
    sums = sum(hsic_of(batch, hsic=hsic_unbiased) for batch in batches)
    whole = [jnp.concatenate([batch[i] for batch in batches]) for i in range(2)]
    found, wanted = normalised(sums)[0, 1], cka(whole, hsic=hsic_unbiased)[0, 1]
    assert abs(found - wanted) < 0.06  # its standard error is 0.025, by the jackknife over batches
    biased = normalised(sum(hsic_of(batch) for batch in batches))[0, 1]
    assert biased - wanted > 3 * abs(found - wanted), "the biased estimator does depend on the batch"


def test_cosines_are_means_over_tokens_and_images():
    f = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    unit = f / np.linalg.norm(f, axis=-1, keepdims=True)
    wanted = [[np.mean(np.sum(a * b, axis=-1)) for b in unit] for a in unit]
    np.testing.assert_allclose(token_cosine(jnp.asarray(f)), wanted, rtol=1e-4, atol=1e-6)
    mean = f.mean(axis=2)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    wanted = [[np.mean(np.sum(a * b, axis=-1)) for b in mean] for a in mean]
    np.testing.assert_allclose(mean_cosine(jnp.asarray(f)), wanted, rtol=1e-4, atol=1e-6)


def test_what_all_tokens_share_does_not_count():
    f = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    shared = np.random.default_rng(1).standard_normal((3, 1, 1, 6)).astype(np.float32)
    centred = f - f.mean(axis=(1, 2), keepdims=True)
    wanted = token_cosine(jnp.asarray(centred))
    np.testing.assert_allclose(centred_cosine(jnp.asarray(f + 3 * shared)), wanted, atol=1e-5)
    np.testing.assert_allclose(mean_share(jnp.asarray(centred)), 0, atol=1e-6)
    energy = np.sum(centred**2, axis=-1).mean(axis=(1, 2))
    of_mean = np.sum(shared**2, axis=-1)[:, 0, 0]
    np.testing.assert_allclose(mean_share(jnp.asarray(centred + shared)), of_mean / (of_mean + energy), rtol=1e-4)


def test_ranks_count_directions():
    flat, one = jnp.eye(6), jnp.diag(jnp.array([5.0, 0, 0, 0, 0, 0]))
    half = jnp.diag(jnp.array([2.0, 2, 2, 0, 0, 0]))
    rotation = jnp.linalg.qr(rows(3, 6, 6))[0]
    for rank in (effective_rank, participation_ratio):
        np.testing.assert_allclose(rank(jnp.stack([flat, one, half])), [6, 1, 3], rtol=1e-4)
        # An eigenvalue that is 0 is found as up to 6 roundings of the largest. The effective rank takes its root, whose
        # share p of the sum is then up to 2e-4; three of them add 3 p log(1 / p) to the entropy.
        np.testing.assert_allclose(rank(rotation @ half @ rotation.T), 3, rtol=5e-3)
    mixed = jnp.diag(jnp.array([9.0, 1.0]))
    np.testing.assert_allclose(participation_ratio(mixed), 100 / 82, rtol=1e-6)
    shares = np.array([0.75, 0.25])  # of the singular values 3 and 1
    np.testing.assert_allclose(effective_rank(mixed), np.exp(-np.sum(shares * np.log(shares))), rtol=1e-5)


def test_channels_are_not_directions():
    """Two directions turned into all channels: the rank stays, the channels used grow."""
    two = jnp.diag(jnp.array([1.0, 1, 0, 0]))
    rotation = jnp.asarray([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0
    turned = rotation @ two @ rotation.T
    np.testing.assert_allclose(channels_used(channel_usage(jnp.stack([two, turned]))), [2, 4], rtol=1e-5)
    np.testing.assert_allclose(participation_ratio(jnp.stack([two, turned])), [2, 2], rtol=1e-5)


def test_scores_of_diversity_by_hand():
    similar = jnp.array([[1, 0.9, 0.5, 0.2], [0.9, 1, 0.8, 0.4], [0.5, 0.8, 1, 0.6], [0.2, 0.4, 0.6, 1]])
    found = {name: float(value) for name, value in diversity(similar).items()}
    assert found == pytest.approx(
        {
            "all": (0.1 + 0.5 + 0.8 + 0.2 + 0.6 + 0.4) / 6,
            "adjacent": (0.1 + 0.2 + 0.4) / 3,
            "mirrored": (0.8 + 0.2) / 2,
            "distant": (0.1 + 2 * 0.5 + 3 * 0.8 + 0.2 + 2 * 0.6 + 0.4) / 10,
        }
    )
    assert found["all"] == pytest.approx(1 - float(off_diagonal_mean(similar)))
    with pytest.raises(ValueError, match="number of blocks = 1: must be at least 2"):
        diversity(jnp.ones((1, 1)))
