"""The judge of solids: real ones score high, noise, other classes and broken solids do not; other data are refused."""

from functools import partial

import numpy as np
import pytest

from diversedit_jax import data, evaluators
from diversedit_jax.data.solids import SHAPE, SIZES, draw
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.evaluators.solids import centred, in_one_piece, real_solids

NAMES = ("accuracy", "frechet", "occupancy", "undecided", "one_piece")
NUM = 400
OPEN = partial(data.make, "solids")


@pytest.fixture(scope="module")
def judge():
    run = evaluators.make("solids", SampleSpec(SHAPE, 100, None, None, OPEN), num=NUM)
    return lambda volumes: dict(run(lambda labels: volumes))


@pytest.fixture(scope="module")
def real():
    """Held-out solids that the judge does not know, with labels 0, 1, ..., 7, 0, ..."""
    return real_solids(OPEN("test").source, 2 * NUM)[0][NUM:]


def test_real_solids_are_what_they_shall_be(judge, real):
    found = judge(real)
    assert list(found) == [*NAMES, *(f"real/{name}" for name in NAMES)]
    assert all(type(value) is float for value in found.values())
    for part in ("", "real/"):
        assert found[f"{part}accuracy"] > 0.97
        assert found[f"{part}one_piece"] == 1
    assert found["frechet"] < 2 * found["real/frechet"]
    assert found["occupancy"] == pytest.approx(real.mean() / 255)
    assert found["occupancy"] == pytest.approx(found["real/occupancy"], rel=0.05)
    assert found["undecided"] == pytest.approx(found["real/undecided"], rel=0.05)


def test_solids_of_the_next_class_are_wrong(judge, real):
    found = judge(np.roll(real, 1, axis=0))
    assert found["accuracy"] < 0.03
    assert found["frechet"] < 2 * found["real/frechet"], "the set is as it was"


def test_what_is_no_solid_is_far_from_real_ones(judge, real):
    rng = np.random.default_rng(0)
    broken = real.copy()
    broken[:, :, :, 7:9] = 0  # cut in two
    noise = rng.integers(0, 256, real.shape).astype(np.uint8)
    for name, volumes in {"noise": noise, "nothing": np.zeros_like(real), "broken": broken}.items():
        found = judge(volumes)
        assert found["frechet"] > 20 * found["real/frechet"], name
        assert found["accuracy"] == pytest.approx(0.125, abs=0.06) or name == "broken", name
        assert found["one_piece"] < 0.05 or name == "noise", name
    assert judge(noise)["undecided"] == pytest.approx(0.8, abs=0.01)


def test_one_class_in_all_samples_is_seen(judge, real):
    found = judge(np.repeat(real[3:4], NUM, axis=0))
    assert found["accuracy"] == 1 / 8
    assert found["frechet"] > 20 * found["real/frechet"]


def test_solids_are_compared_in_the_middle(real):
    for moved in (draw("pyramid", 5.5, (1.0, -2.0, 0.0)), draw("pyramid", 5.5, (-1.0, 2.0, 2.0))):
        volumes = np.round(255 * np.stack([moved, draw("pyramid", 5.5)])[..., None]).astype(np.uint8)
        there, middle = centred(volumes)
        np.testing.assert_array_equal(there, middle)
    assert not centred(np.zeros_like(real[:1])).any()


@pytest.mark.parametrize(
    ("voxels", "whole"),
    [
        ([], False),
        ([(0, 0, 0)], True),
        ([(0, 0, 0), (1, 1, 1), (1, 2, 1)], True),
        ([(0, 0, 0), (0, 0, 2)], False),
        ([(0, 0, 0), (0, 0, 4)], False),  # the walls are not connected
        ([(1, 1, 1), (4, 4, 4), (1, 2, 1)], False),
    ],
)
def test_pieces_are_connected_by_faces_edges_or_corners(voxels, whole):
    full = np.zeros((5, 5, 5), bool)
    for voxel in voxels:
        full[voxel] = True
    assert in_one_piece(full) == whole
    assert in_one_piece(full[::-1, ::-1, ::-1]) == whole


def test_a_piece_may_be_a_long_way():
    full = np.zeros((9, 9, 9), bool)
    full[::2] = True
    full[1::4, 0, 0] = full[3::4, 8, 8] = True
    assert in_one_piece(full)
    full[3, 8, 8] = False
    assert not in_one_piece(full)


def test_other_data_are_refused():
    with pytest.raises(ConfigError, match=r"solids: the samples are \(8, 8, 1\), wanted volumes \(16, 16, 16, 1\)"):
        evaluators.make("solids", SampleSpec((8, 8, 1), 100, None, None, None))
    with pytest.raises(ConfigError, match="solids: the samples are latents"):
        evaluators.make("solids", SampleSpec(None, 100, None, None, None))
    other = partial(data.make, "synthetic")
    with pytest.raises(ConfigError, match=r"solids: the run has other data: it judges config.data.name = 'solids'"):
        evaluators.make("solids", SampleSpec(SHAPE, 100, None, None, other))


@pytest.mark.parametrize("num", [1, SIZES["test"] + 1])
def test_the_number_of_samples_has_a_range(num):
    with pytest.raises(ConfigError, match=f"solids: num = {num}: must be"):
        evaluators.make("solids", SampleSpec(SHAPE, 100, None, None, None), num=num)
