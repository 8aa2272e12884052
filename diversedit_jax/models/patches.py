"""Patches of images, videos and volumes, and their positions: how examples become tokens."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from diversedit_jax.api import Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import MANY, in_range, one_of

POSITIONS = ("auto", "axes", "frames", "learned_frames", "space")


class Patches(NamedTuple):
    """How examples are cut, and where the pieces lie.

    shape: of an example (*s, c). sides: of a patch along each spatial axis. positions: one of POSITIONS but `auto`.
    base: of `position_table`.
    """

    shape: tuple[int, ...]
    sides: tuple[int, ...]
    positions: str = "axes"
    base: int | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each spatial axis."""
        return places(self.shape, self.sides)

    def table(self, width: int) -> np.ndarray:
        """The fixed position table [n d]."""
        return position_table(self.grid, width, self.positions, self.base)


def patches_of(
    space: Space, patch: int, patch_frames: int = 1, positions: str = "auto", base_grid: int | None = None
) -> Patches:
    """The patches of the examples of `space`, for options of a model. ConfigError if they do not fit.

    patch: side along each axis of an image or a volume, and of a frame of a video, in elements of x.
    patch_frames: frames of a video in a patch.
    positions: one of POSITIONS, see `position_table`. `learned_frames`: parameters for each frame, zero at first, so
        that a network of images can be given frames. `space`: frames have no order. `auto`: `frames` for a video, else
        `axes`.
    base_grid: positions are spread over the range of a grid with so many patches along each axis, so that a network
        trained there keeps its range. A table over frames is never spread. None: over the grid itself.
    """
    sides = sides_of(space, patch, patch_frames)
    *given, _ = space.shape
    if not given or any(side % of for side, of in zip(given, sides, strict=True)):
        has, wanted = (" x ".join(map(str, numbers)) for numbers in (given, sides))
        raise ConfigError(f"model.patch: patches of {wanted} do not divide examples of {has}")
    if base_grid is not None:
        in_range("model.base_grid", base_grid, 1, MANY)
    return Patches(tuple(space.shape), sides, positions_of(space, positions), base_grid)


def sides_of(space: Space, patch: int, patch_frames: int = 1) -> tuple[int, ...]:
    """The sides of a patch along each spatial axis of the examples of `space`."""
    in_range("model.patch", patch, 1)
    in_range("model.patch_frames", patch_frames, 1)
    axes = len(space.shape) - 1
    if space.video:
        return patch_frames, *(patch,) * (axes - 1)
    if patch_frames > 1:
        raise ConfigError(f"model.patch_frames = {patch_frames} is for videos, and the examples of these data are none")
    return (patch,) * axes


def positions_of(space: Space, positions: str) -> str:
    """The kind of positions of a network for examples of `space`: `auto` made definite."""
    if one_of("model.positions", positions, POSITIONS) == "auto":
        return "frames" if space.video else "axes"
    if positions != "axes" and not space.video:
        raise ConfigError(f"model.positions = {positions!r} is for videos, and the examples of these data are none")
    return positions


def check_table(width: int, patches: Patches) -> None:
    """Raise ConfigError for a width that the fixed position table cannot have."""
    axes = len(patches.sides) - (patches.positions != "axes")
    if width % (parts := 2 * axes):
        raise ConfigError(f"model.width = {width}: the position table needs a multiple of {parts}")


def patchify(x: Float[Array, "b *s c"], patch: tuple[int, ...]) -> Float[Array, "b n p"]:
    """Patches with these sides in row-major order, each flattened as (place in the patch, channel)."""
    b, *sides, c = x.shape
    axes, grid = len(sides), places(x.shape[1:], patch)
    x = x.reshape(b, *(n for pair in zip(grid, patch, strict=True) for n in pair), c)
    x = x.transpose(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return x.reshape(b, math.prod(grid), math.prod(patch) * c)


def unpatchify(x: Float[Array, "b n p"], shape: tuple[int, ...], patch: tuple[int, ...]) -> Float[Array, "b *s c"]:
    """The inverse of `patchify`, for examples of `shape` (*s, c)."""
    *sides, c = shape
    axes = len(sides)
    x = x.reshape(-1, *places(shape, patch), *patch, c)
    x = x.transpose(0, *(i for axis in range(axes) for i in (1 + axis, 1 + axes + axis)), 2 * axes + 1)
    return x.reshape(-1, *shape)


def places(shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Patches along each spatial axis of examples of `shape` (*s, c)."""
    return tuple(side // of for side, of in zip(shape[:-1], patch, strict=True))


def position_table(grid: tuple[int, ...], width: int, positions: str = "axes", base: int | None = None) -> np.ndarray:
    """The fixed sin-cos table [n d] of DiT, for a grid of patches with any number of axes.

    positions: one of POSITIONS. `axes`: the channels are divided evenly among the axes, the last axis first: of an
        image, half encode the column, the others the row. The others, for videos: the table of one frame for all, and
        with `frames` one over frames of the full width is added to it, as in Latte (arXiv 2401.03048). It is taken
        relative to the first frame, so a video of one frame has the positions of an image.
    base: places lie at i base / side along each axis: a network that has learned the places of `base` patches keeps
        their range. The table over frames stays. None: at i.
    """
    if positions != "axes":
        frame = np.tile(position_table(grid[1:], width, base=base), (grid[0], 1))
        if positions != "frames":
            return frame
        time = position_table(grid[:1], width)
        return frame + np.repeat(time - time[0], math.prod(grid[1:]), axis=0)
    per_axis = width // (2 * len(grid))
    frequencies = 10000.0 ** -(np.arange(per_axis) / per_axis)
    steps = [1 if base is None else base / side for side in grid]
    places = np.meshgrid(*(np.arange(side) * step for side, step in zip(grid, steps, strict=True)), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in reversed(places)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)
