"""Inception Score: its definition term by term, its extremes, and the ADM evaluator's value."""

import numpy as np
import pytest

from diversedit_jax.metrics.inception_score import inception_score, probabilities
from tests import DATA

GOLDEN = np.load(DATA / "adm_metrics.npz")  # `probs` and the ADM evaluator's value


def dirichlet(n: int, k: int = 6) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(k, 0.3), n)


def divergence(p) -> float:
    """mean KL(p(y|x) || p(y)), term by term."""
    mean = p.mean(axis=0)
    return sum(a * np.log(a / b) for row in p for a, b in zip(row, mean, strict=True)) / len(p)


def test_it_is_the_value_of_the_adm_evaluator():
    mean, std = inception_score(GOLDEN["probs"], split=500)
    np.testing.assert_allclose(mean, GOLDEN["is_split500"], rtol=1e-6)
    assert std > 0


def test_it_is_the_definition_over_splits_in_order_with_a_shorter_last_one():
    p = dirichlet(50)
    scores = [np.exp(divergence(part)) for part in (p[:20], p[20:40], p[40:])]
    np.testing.assert_allclose(inception_score(p, split=20), (np.mean(scores), np.std(scores)), rtol=1e-12)
    np.testing.assert_allclose(inception_score(p), (np.exp(divergence(p)), 0), rtol=1e-12)


def test_single_precision_is_summed_in_double():
    p = dirichlet(50).astype(np.float32)
    assert inception_score(p, split=20) == inception_score(p.astype(np.float64), split=20)


def test_sure_and_even_is_the_number_of_classes_and_zeros_are_no_trouble():
    np.testing.assert_allclose(inception_score(np.tile(np.eye(7, 9), (3, 1))), (7, 0), rtol=1e-12)


def test_images_that_look_alike_score_one():
    np.testing.assert_allclose(inception_score(np.tile(dirichlet(1), (10, 1))), (1, 0), rtol=1e-12)


def test_probabilities_are_the_softmax_also_of_large_logits():
    logits = np.array([[0, np.log(3), 0], [1e4, 1e4, -1e4]], np.float32)
    found = probabilities(logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [[0.2, 0.6, 0.2], [0.5, 0.5, 0]], rtol=1e-7)
    np.testing.assert_allclose(probabilities(logits + 8), found, rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "split", "said"),
    [
        (np.zeros((0, 4)), 5, r"n >= 1, given shape \(0, 4\)"),
        (np.full(4, 0.25), 5, r"given shape \(4,\)"),
        (np.full((3, 4), np.nan), 5, "12 of 12 values of probabilities are not finite"),
        (np.diag([1, 1.01, 0.9]), 5, "2 of 3 rows of probabilities do not sum to 1: row 1 to 1.01"),
        (np.array([[1.5, -0.5]]), 5, "the smallest probability = -0.5: must be at least 0"),
        (np.eye(2), 0, "split = 0: must be at least 1"),
    ],
)
def test_what_is_no_distribution_is_an_error(given, split, said):
    with pytest.raises(ValueError, match=said):
        inception_score(given, split)


def test_logits_must_be_finite():
    with pytest.raises(ValueError, match="1 of 2 values of logits are not finite"):
        probabilities(np.array([[0, np.inf]]))
