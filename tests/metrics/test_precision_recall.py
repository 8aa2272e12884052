"""Improved precision and recall: its definition in plain numpy, blocks that change nothing, and the ADM evaluator."""

import numpy as np
import pytest

from diversedit_jax.metrics import precision_recall as module
from diversedit_jax.metrics.precision_recall import blocks, precision_recall, squared_radii
from tests import DATA

GOLDEN = np.load(DATA / "adm_metrics.npz")  # features and the ADM evaluator's values
REF, SAMPLES = GOLDEN["ref"], GOLDEN["samples"]


def normal(seed: int, n: int, d: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def literal(reference, samples, k):
    """The definition, point by point, in float64."""

    def distance(u, v):
        return np.sqrt(np.sum((u.astype(np.float64) - v) ** 2))

    def ball(points, i):
        return sorted(distance(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    def inside(points, others):
        radii = [ball(others, j) for j in range(len(others))]
        return np.mean([any(distance(p, o) <= r for o, r in zip(others, radii, strict=True)) for p in points])

    return inside(samples, reference), inside(reference, samples)


def radii(features, *, k=3, distances="float16"):
    found = squared_radii(blocks(features, 2048), k, module.DISTANCES[distances])
    return np.concatenate(found)[: len(features)]


@pytest.mark.parametrize("k", [1, 3])
def test_it_is_the_definition_point_by_point(k):
    reference, samples = normal(0, 37), 0.7 * normal(1, 28) + 0.3
    assert precision_recall(reference, samples, k=k, block=10) == pytest.approx(literal(reference, samples, k))


@pytest.mark.parametrize("distances", module.DISTANCES)
def test_blocks_change_nothing(distances):
    sets = normal(0, 60), 0.7 * normal(1, 60) + 0.3
    whole = precision_recall(*sets, distances=distances)
    assert 0 < min(whole) < max(whole) < 1
    assert precision_recall(*sets, distances=distances, block=17) == whole


def test_in_float16_it_is_the_value_of_the_adm_evaluator():
    found = precision_recall(REF, SAMPLES, distances="float16")
    np.testing.assert_allclose(found, (GOLDEN["precision"][0], GOLDEN["recall"][0]), rtol=1e-12)


def test_in_float32_another_point_is_covered():
    precision, recall = precision_recall(REF, SAMPLES)
    assert precision == pytest.approx(GOLDEN["precision"][0])
    assert recall == pytest.approx(GOLDEN["recall"][0] - 1 / len(REF))


def test_radii_are_those_of_the_adm_evaluator_but_for_the_order_of_its_sums():
    wanted = GOLDEN["radii_ref"][:, 0]
    unit = np.spacing(wanted.astype(np.float16)).astype(np.float32)
    assert (np.abs(radii(REF) - wanted) / unit).max() <= 2

    # On the CPU that made the file, norms were summed in float16: in four sums of eight lanes, the lanes last.
    rows = REF.astype(np.float16)
    lanes = np.square(rows).reshape(len(rows), 2, 4, 8)
    four = lanes[:, 0] + lanes[:, 1]
    norms = (four[:, 0] + four[:, 1] + four[:, 2] + four[:, 3]).sum(axis=1, dtype=np.float32).astype(np.float16)
    products = (rows.astype(np.float32) @ rows.astype(np.float32).T).astype(np.float16)
    distances = np.maximum(norms[:, None] - 2 * products + norms, 0)
    np.testing.assert_array_equal(np.sort(distances, axis=1)[:, 3], wanted)


def test_float16_rounds_every_operation():
    rows = normal(0, 50, 64).astype(np.float16)
    norms = np.square(rows).sum(axis=1, dtype=np.float32).astype(np.float16)
    products = (rows.astype(np.float64) @ rows.astype(np.float64).T).astype(np.float16)
    wanted = np.maximum(norms[:, None] - 2 * products + norms, 0)
    np.testing.assert_array_equal(radii(rows.astype(np.float32)), np.sort(wanted, axis=1)[:, 3])


@pytest.mark.parametrize("scale", [100, 1e5], ids=["norms", "features"])
def test_beyond_the_range_of_float16_it_is_computed_in_float32(scale):
    features = normal(0, 60) * np.float32(scale)
    np.testing.assert_array_equal(radii(features), radii(features, distances="exact"))


def test_a_product_beyond_the_range_of_float16_is_no_distance_of_zero():
    # |u|^2 = 40,500 is within, 2 u.v = 81,000 is not
    features = 90 + normal(0, 60)
    np.testing.assert_array_equal(radii(features), radii(features, distances="exact"))


@pytest.mark.parametrize("distances", module.DISTANCES)
def test_equal_sets_are_precise_and_covered(distances):
    features = np.concatenate([normal(0, 45, 300), normal(0, 9, 300), np.ones((6, 300), np.float32)])  # with duplicates
    assert precision_recall(features, features, distances=distances, block=32) == (1, 1)


def test_sets_apart_are_neither():
    assert precision_recall(normal(0, 60), normal(1, 60) + 100) == (0, 0)


def test_what_fills_up_a_block_covers_nothing():
    """Blocks of 8 rows for 15: the row of zeros is no point, though a sample lies there."""
    far, near = normal(0, 15) + 100, normal(1, 15)
    near[0] = 0
    assert precision_recall(far, near, block=8) == (0, 0)
    assert precision_recall(near, far, block=8) == (0, 0)


def test_a_part_of_the_reference_is_precise_but_does_not_cover_it():
    two = np.concatenate([normal(0, 60), normal(1, 60) + 100])
    assert precision_recall(two, two[:60], block=60) == (1, 0.5)


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match=r"reference must be features \[n d\] with n >= 4, given shape \(3, 5\)"):
        precision_recall(normal(0, 3), normal(1, 9))
    with pytest.raises(ValueError, match=r"one dimension d, given reference \(9, 5\), samples \(9, 4\)"):
        precision_recall(normal(0, 9), normal(1, 9, 4))
    with pytest.raises(ValueError, match="9 of 45 values of samples are not finite"):
        precision_recall(normal(0, 9), normal(1, 9) * np.float32([1, 1, 1, np.inf, 1]))
    with pytest.raises(ValueError, match=r"distances = 'float64' is unknown; .*known: exact, float16"):
        precision_recall(normal(0, 9), normal(1, 9), distances="float64")
    with pytest.raises(ValueError, match="k = 0: must be at least 1"):
        precision_recall(normal(0, 9), normal(1, 9), k=0)
