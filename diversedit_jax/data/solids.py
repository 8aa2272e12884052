"""Solids in a grid of 16 x 16 x 16 voxels, in eight classes: volumes that need no download.

Each solid stands upright, a little rotated about the vertical, and has a random size and place. Voxels hold occupancy,
from -1 (empty) to 1 (full). An example is computed from its number whenever it is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset
from diversedit_jax.registry import one_of

SIDE = 16  # voxels
SHAPE = (SIDE, SIDE, SIDE, 1)
SIZES = {"train": 65_536, "test": 8_192}
RADII = 5.5, 7.0  # of the sphere around a solid, in voxels
TURN = np.pi / 9  # the largest rotation about the vertical: 20 degrees
EDGE = 1.5  # width of the zone between full and empty, in voxels

Axis = Float[np.ndarray, "d h w"]  # coordinates of all voxels along one axis
Distance = Callable[[Axis, Axis, Axis], Axis]  # below 0 inside, above 0 outside


def box(x: Axis, y: Axis, z: Axis, *, half: tuple[float, float, float]) -> Axis:
    """A box with half edges `half`."""
    return np.maximum.reduce([abs(axis) - edge for axis, edge in zip((x, y, z), half, strict=True)])


def ball(x: Axis, y: Axis, z: Axis) -> Axis:
    """The whole sphere."""
    return np.sqrt(x * x + y * y + z * z) - 1


def cube(x: Axis, y: Axis, z: Axis) -> Axis:
    """A cube whose corners lie on the sphere."""
    return box(x, y, z, half=(3**-0.5,) * 3)


def cylinder(x: Axis, y: Axis, z: Axis) -> Axis:
    """A cylinder of radius 0.5 around the axis z, whose edges lie on the sphere."""
    return np.maximum(np.hypot(x, y) - 0.5, abs(z) - 0.75**0.5)


def tapered(across: Axis, z: Axis, base: float) -> Axis:
    """What narrows from a base at z = -0.5 to a point at z = 1. across: from the axis. base: half width of the base."""
    side = (1.5 * across - base * (1 - z)) / np.hypot(1.5, base)
    return np.maximum(side, -0.5 - z)


def cone(x: Axis, y: Axis, z: Axis) -> Axis:
    """A cone whose apex and base lie on the sphere."""
    return tapered(np.hypot(x, y), z, 0.75**0.5)


def pyramid(x: Axis, y: Axis, z: Axis) -> Axis:
    """A pyramid on a square, whose five corners lie on the sphere."""
    return tapered(np.maximum(abs(x), abs(y)), z, 0.375**0.5)


def torus(x: Axis, y: Axis, z: Axis) -> Axis:
    """A ring around the axis z. Its tube has a radius of 0.28."""
    return np.hypot(np.hypot(x, y) - 0.72, z) - 0.28


def octahedron(x: Axis, y: Axis, z: Axis) -> Axis:
    """An octahedron whose corners lie on the sphere."""
    return (abs(x) + abs(y) + abs(z) - 1) / 3**0.5


def cross(x: Axis, y: Axis, z: Axis) -> Axis:
    """Three bars along the axes, whose ends lie on the sphere. They are 0.4 thick."""
    long, thin = 0.92**0.5, 0.2
    return np.minimum.reduce([box(x, y, z, half=tuple(np.roll((long, thin, thin), axis))) for axis in range(3)])


# (x, y, z) -> distance from the surface of a solid in the sphere of radius 1; exact near its faces.
SOLIDS: dict[str, Distance] = {
    solid.__name__: solid for solid in (ball, cube, cylinder, cone, pyramid, torus, octahedron, cross)
}
NAMES = tuple(SOLIDS)


def draw(
    name: str, radius: float, centre: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0), angle: float = 0.0
) -> Float[np.ndarray, "16 16 16"]:
    """The occupancy of each voxel, float32 in [0, 1].

    name:   of a solid of SOLIDS. It stands upright: slice 0 of the grid is the top.
    radius: of the sphere around it, in voxels. centre: of the sphere, in voxels from the middle of the grid.
    angle:  by which it is rotated about its axis z, in radians.
    """
    middle = (SIDE - 1) / 2
    d, h, w = ((axis - middle - place) / radius for axis, place in zip(np.indices(SHAPE[:3]), centre, strict=True))
    x, y = np.cos(angle) * h + np.sin(angle) * w, np.cos(angle) * w - np.sin(angle) * h
    distance = radius * SOLIDS[name](x, y, -d)  # the first row of an image is its top, too
    return np.clip(0.5 - distance / EDGE, 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Solids:
    """Examples by index: `x` float32 [16 16 16 1] in [-1, 1], and `y`. The classes take turns."""

    split: str

    def __len__(self) -> int:
        return SIZES[self.split]

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng([list(SIZES).index(self.split), index])
        y = index % len(NAMES)
        radius = rng.uniform(*RADII)
        centre = rng.uniform(-1, 1, 3) * ((SIDE - 1) / 2 - radius)
        occupancy = draw(NAMES[y], radius, centre, rng.uniform(-TURN, TURN))
        return {"x": 2 * occupancy[..., None] - 1, "y": np.int32(y)}


def make(split: str) -> Dataset:
    """The solids: `x` float32 [16 16 16 1] in [-1, 1] and `y` int32; 65,536 to train on, and 8,192 others as `test`.

    The sphere around a solid has a radius of 5.5 to 7 voxels and lies inside the grid. The solid stands upright and is
    rotated by at most 20 degrees about the vertical. All of these are uniform.
    """
    one_of("solids: split", split, SIZES)
    return Dataset(Solids(split), None, Space(SHAPE, Conditions.labels(len(NAMES), NAMES)))
