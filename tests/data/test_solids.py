"""Solids: their volumes, sizes and places, and splits that share no example."""

import math
import pickle

import numpy as np
import pytest

from diversedit_jax import data
from diversedit_jax.data import solids
from diversedit_jax.data.solids import EDGE, NAMES, RADII, SHAPE, SIDE, SIZES, draw
from diversedit_jax.errors import ConfigError

# In a sphere of radius 1, by the formulas of schoolbooks.
VOLUMES = {
    "ball": 4 / 3 * math.pi,
    "cube": (2 / math.sqrt(3)) ** 3,
    "cylinder": math.pi * 0.5**2 * math.sqrt(3),
    "cone": math.pi * 0.75 * 1.5 / 3,
    "pyramid": 1.5 * 1.5 / 3,  # its base is a square of diagonal sqrt(3)
    "torus": 2 * math.pi**2 * 0.72 * 0.28**2,
    "octahedron": 4 / 3,
    "cross": 3 * 2 * math.sqrt(0.92) * 0.4**2 - 2 * 0.4**3,
}


@pytest.fixture(scope="module")
def source():
    return data.make("solids", "train").source


@pytest.mark.parametrize("name", NAMES)
def test_a_solid_has_its_volume_wherever_it_lies(name):
    rng = np.random.default_rng(0)
    volumes = []
    for _ in range(600):
        radius = rng.uniform(*RADII)
        full = draw(name, radius, rng.uniform(-0.5, 0.5, 3), rng.uniform(-1, 1)) > 0.5
        volumes.append(np.count_nonzero(full) / radius**3)
    assert np.mean(volumes) == pytest.approx(VOLUMES[name], rel=0.03)  # one cross: up to 20%, the mean of 600: 0.8%


def test_a_ball_lies_where_it_is_put_and_its_edge_is_soft():
    occupancy = draw("ball", 5.0, np.array([1.5, 0, -2]))
    # The mean of 4/3 pi r^3 over radii from 5 - EDGE / 2 to 5 + EDGE / 2.
    assert occupancy.sum() == pytest.approx(4 / 3 * math.pi * (5**3 + 5 * EDGE**2 / 4), rel=0.002)
    middle = np.indices(SHAPE[:3]).reshape(3, -1) @ occupancy.ravel() / occupancy.sum()
    np.testing.assert_allclose(middle, np.array([9, 7.5, 5.5]), atol=1e-4)


def test_solids_are_rotated_about_the_vertical():
    for name in ("pyramid", "cross"):
        still = draw(name, 7.0, (0.5, -0.3, 0.2))
        turned = draw(name, 7.0, (0.5, 0.2, 0.3), math.pi / 2)
        np.testing.assert_allclose(turned, np.rot90(still, -1, (1, 2)), atol=1e-5)
        assert abs(draw(name, 7.0, angle=math.pi / 4) - draw(name, 7.0)).max() > 0.5
    for name in ("ball", "cylinder", "cone", "torus"):
        np.testing.assert_allclose(draw(name, 7.0, angle=0.6), draw(name, 7.0), atol=1e-5)


def test_a_cone_stands_on_its_base():
    slices = draw("cone", 7.0).sum(axis=(1, 2))
    assert (np.diff(slices[1:11]) > 0).all(), "slice 0 is the top"
    assert slices[12:].sum() == 0


def test_examples_lie_inside_the_grid_and_are_balanced(source):
    examples = [source[i] for i in range(400)]
    x = np.stack([example["x"] for example in examples])
    assert (x.dtype, x.shape[1:]) == (np.float32, SHAPE)
    assert (x.min(), x.max()) == (-1, 1)
    occupancy = (x[..., 0] + 1) / 2
    full = occupancy > 0.5
    for axis in (1, 2, 3):
        assert occupancy.take((0, SIDE - 1), axis).max() <= 0.5 + 1e-6, "a wall cuts a solid"
    labels = np.array([example["y"] for example in examples])
    assert np.bincount(labels).tolist() == [50] * len(NAMES)
    balls = occupancy[labels == 0].sum(axis=(1, 2, 3)) / VOLUMES["ball"]
    smallest, small, large, largest = (r**3 + r * EDGE**2 / 4 for r in (RADII[0], 5.7, 6.8, RADII[1]))
    assert smallest * 0.998 < balls.min() < small
    assert large < balls.max() < largest * 1.002
    for label, name in enumerate(NAMES):
        radii = np.cbrt(full[labels == label].sum(axis=(1, 2, 3)) / VOLUMES[name])
        assert radii.mean() == pytest.approx(np.mean(RADII), abs=0.25), name  # three standard deviations


def test_examples_are_the_same_each_time_and_none_is_there_twice(source):
    test = data.make("solids", "test").source
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(source[77]["x"], again[77]["x"])
    seen = {source[i]["x"].tobytes() for i in range(200)} | {test[i]["x"].tobytes() for i in range(200)}
    assert len(seen) == 400
    assert {"train": len(source), "test": len(test)} == SIZES


def test_the_space_names_its_classes():
    space = data.make("solids", "test").space
    assert (space.shape, space.conditions.classes, space.video) == ((16, 16, 16, 1), 8, False)
    assert space.conditions.named(np.int32([0, 5])) == ["ball", "torus"]
    with pytest.raises(ConfigError, match="solids: split = 'val' is unknown"):
        data.make("solids", "val")


def test_every_solid_fills_the_sphere_around_it():
    places = np.stack(np.meshgrid(*[np.linspace(-1.1, 1.1, 67)] * 3, indexing="ij"))  # 0, 1/30, 2/30, ...
    lengths = np.linalg.norm(places, axis=0)
    for name, distance in solids.SOLIDS.items():
        assert 0.95 < lengths[distance(*places) < 1e-9].max() <= 1 + 1e-9, name
    assert list(solids.SOLIDS) == list(VOLUMES)
