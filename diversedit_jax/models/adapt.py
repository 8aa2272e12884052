"""Parameters of a trained network, changed to fit another one: what `Model.adapted` of several networks share.

Everything is numpy on the host.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from diversedit_jax.api import Made, Params, Rows
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import bicubic
from diversedit_jax.models.patches import places, sides_of


def check_name(was: Made, now: Made) -> None:
    """Raise ConfigError if the network is of another model: the same arrays may then mean something else."""
    old, new = (made.options["name"] for made in (was, now))
    if old != new:
        raise ConfigError(f"its network is a {old}: --config.model.name must be {old!r}, given {new!r}")


def patch_sides(made: Made) -> tuple[int, ...]:
    """The sides of a patch along each spatial axis."""
    return sides_of(made.space, made.options["patch"], made.options.get("patch_frames", 1))


def grid(made: Made) -> tuple[int, ...]:
    """Patches along each spatial axis."""
    return places(made.space.shape, patch_sides(made))


def by(sides: Sequence[int]) -> str:
    """Sides in words, such as 16 x 16."""
    return " x ".join(map(str, sides))


def new_labels(was: Made, now: Made, params: Params) -> tuple[Params, list[str]]:
    """The table of labels of a network for another number of classes: new, but for the null label, its last row.

    What the network knows of "no label" is not about classes. Two tables with as many rows are taken for the same.
    """
    old, new = (made.space.conditions.classes for made in (was, now))
    if old == new or None in (old, new) or "label_embed" not in params:
        return params, []
    null = Rows((new,), params["label_embed"]["embedding"][old:], new + 1)
    told = f"it knows {old} classes, the data have {new}: the table of labels is new, but for the null label"
    return {**params, "label_embed": {"embedding": null}}, [told]


def new_patches(params: Params, old: Sequence[int], new: Sequence[int], channels: int) -> tuple[Params, list[str]]:
    """The first and the last layer, `patch_embed` and `final`, for patches with other sides.

    A network with patches k times as large sees the mean of k elements along each axis where the old one saw one, and
    gives each of them the old one's output. With smaller patches it is the other way round.

    old, new: sides of a patch along each axis. channels: of its examples.
    """
    if tuple(old) == tuple(new):
        return params, []
    was, now = by(old), by(new)
    if any(max(pair) % min(pair) for pair in zip(old, new, strict=True)):
        raise ConfigError(f"its patches are {was}, those of config.model {now}: one must be a multiple of the other")
    params = dict(params)
    if "patch_embed" in params:
        kernel = resized_patch(params["patch_embed"]["kernel"], old, new, channels)
        params["patch_embed"] = {**params["patch_embed"], "kernel": kernel * (np.prod(old) / np.prod(new))}
    if "final" in params:
        channels = len(params["final"]["bias"]) // int(np.prod(old))
        kernel = resized_patch(params["final"]["kernel"].T, old, new, channels).T
        bias = resized_patch(params["final"]["bias"][:, None], old, new, channels)[:, 0]
        params["final"] = {"kernel": kernel, "bias": bias}
    for name in {"patch_embed", "final"} & params.keys():
        params[name] = {part: np.ascontiguousarray(leaf, np.float32) for part, leaf in params[name].items()}
    return params, [f"its patches are {was}, those of this run {now}: its first and its last layer are resized"]


def resized_patch(
    rows: Float[np.ndarray, "p d"], old: Sequence[int], new: Sequence[int], channels: int
) -> Float[np.ndarray, "q d"]:
    """Rows for the elements of a patch (place, channel): repeated for a larger patch, means for a smaller one."""
    x = rows.reshape(*old, channels, -1)
    for axis, (had, wanted) in enumerate(zip(old, new, strict=True)):
        if wanted >= had:
            x = np.repeat(x, wanted // had, axis=axis)
        else:
            x = x.reshape(*x.shape[:axis], wanted, had // wanted, *x.shape[axis + 1 :]).mean(axis=axis + 1)
    return x.reshape(-1, rows.shape[1])


def resized_table(table: Float[np.ndarray, "n d"], old: Sequence[int], new: Sequence[int]) -> Float[np.ndarray, "m d"]:
    """A learned table of positions for another grid of patches, bicubic along each axis.

    The kernel keeps numbers that grow evenly, and takes the mean of many where the new grid is coarser.
    """
    x = table.reshape(*old, -1)
    for axis, (had, wanted) in enumerate(zip(old, new, strict=True)):
        x = np.moveaxis(np.tensordot(bicubic.weights(had, wanted, antialias=True), x, axes=(1, axis)), 0, axis)
    return x.reshape(-1, table.shape[1])


def interleaved(stacks: Sequence[Params], first: int, count: int) -> Params:
    """Layers of a network twice as deep, [count ...] from block `first` on: old block i is block 2 i, the others new.

    stacks: all old blocks in order, as stacks with a leading layer axis.
    """

    def rows(*parts: np.ndarray) -> Rows:
        blocks = np.concatenate(parts)
        chosen = [i for i in range(len(blocks)) if first <= 2 * i < first + count]
        return Rows(tuple(2 * i - first for i in chosen), blocks[chosen], count)

    return jax.tree.map(rows, *stacks)
