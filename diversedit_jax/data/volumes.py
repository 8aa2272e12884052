"""Volumes in .npy files, one in each, to train on without an autoencoder.

    CLASS/NAME.npy         numbers [d h w] or [d h w c]; all volumes have one shape

Every folder at the top is a class, in the order of the names; volumes may lie deeper. A folder of splits is one as for
images, see `image_collections`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, local_path
from diversedit_jax.data.image_collections import (
    ImageFiles,
    by_folder,
    checked,
    numbered,
    read_file,
    split_of,
    walk,
)
from diversedit_jax.errors import ConfigError, DataError, check_machine
from diversedit_jax.reading import parse_npy
from diversedit_jax.registry import in_range

AXES = 3
# Kind of numbers, or kind and bytes -> the values that become -1 and 1.
LIMITS = {"b": (0, 1), "u1": (0, 255), "f": (-1, 1)}


@dataclass(frozen=True)
class Volumes:
    """Examples by index: `x` float32 [d h w c] in [-1, 1], and `y`.

    limits: the values that become -1 and 1; None: by the type of the numbers, see LIMITS.
    shape:  of every volume; (): any.
    """

    files: ImageFiles
    limits: tuple[float, float] | None
    shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        try:
            volume = parse_npy(self.files.read(index))
            if volume.ndim == AXES:
                volume = volume[..., None]
            if volume.ndim != AXES + 1 or not volume.size:
                raise ValueError(f"its shape is {list(volume.shape)}: wanted [d h w] or [d h w c]")
            if self.shape and volume.shape != self.shape:
                raise ValueError(f"its shape is {list(volume.shape)}, that of volume 0 is {list(self.shape)}")
            return {"x": scaled(volume, self.limits), "y": self.files.labels[index]}
        except OSError as error:
            check_machine(error)
            raise
        except Exception as error:
            check_machine(error)
            raise DataError(f"{self.files.path / self.files.keys[index]}: {error}") from error


def open_volumes(path: str | Path, split: str | None = None, unconditional: bool = False) -> ImageFiles:
    """Open the folder at `path`. split, unconditional: as in `image_collections.open_images`. DataError without any."""
    path = local_path("volumes", path)
    if not path.is_dir():
        raise DataError(f"volumes: {path} is not a folder")
    path = split_of(path, split, "volumes")
    ignored: Counter[str] = Counter()
    keys = sorted(walk(path, "", (".npy",), ignored))
    read = partial(read_file, path, keys)
    if unconditional:
        return checked(numbered("folder", path, keys, {}, read, ignored, "volumes"))
    return checked(by_folder("folder", path, keys, read, ignored, what="volumes"))


def scaled(volume: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    """Numbers as float32 in [-1, 1]. limits: as in `Volumes`. ValueError for numbers that do not fit."""
    kind = volume.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"it holds {volume.dtype}: wanted numbers")
    if kind == "f" and not np.isfinite(volume).all():
        raise ValueError("it has numbers that are not finite")
    known = LIMITS.get(kind, LIMITS.get(f"{kind}{volume.dtype.itemsize}"))
    low, high = limits or known or (None, None)
    least, most = volume.min(), volume.max()
    occupancy = kind == "u" and most == 1  # 0 and 1 stored as bytes would be nearly black
    if low is None:
        raise ValueError(f"it holds {volume.dtype} from {least} to {most}: give low and high, which become -1 and 1")
    if limits is None and (least < low or most > high or occupancy):
        raise ValueError(f"its values reach from {least} to {most}, not {low:g} to {high:g}: give low and high")
    middle, half = (low + high) / 2, (high - low) / 2
    return np.clip((volume.astype(np.float64) - middle) / half, -1, 1).astype(np.float32)


def mirrored(example: dict, rng: np.random.Generator, axes: Sequence[int]) -> dict:
    """Mirror the volume along each of these axes with probability 1/2."""
    chosen = [axis for axis in axes if rng.random() < 0.5]
    return example | {"x": np.flip(example["x"], chosen)}


def make(
    split: str,
    *,
    data_dir: str,
    low: float | None = None,
    high: float | None = None,
    mirror: tuple[int, ...] = (),
    unconditional: bool = False,
) -> Dataset:
    """The volumes in `data_dir`, with the classes of its folders.

    data_dir:  the folder. low, high: the values that become -1 and 1; those beyond are cut off. Without them: 0 and 1
               for bool, 0 and 255 for uint8, -1 and 1 for floats, which must not lie beyond. Other integers need them.
    mirror:    axes along which a draw is mirrored, each with probability 1/2: 0 (d), 1 (h), 2 (w).
    unconditional: do not read labels.

    Raises DataError, which names the file, for one that is damaged or does not fit. The first is read now.
    """
    if (low is None) != (high is None):
        raise ConfigError(f"volumes: low = {low} and high = {high}: give both or neither")
    limits = None if low is None else (low, in_range("volumes: high", high, above=low))
    if len(set(mirror)) < len(mirror) or not set(mirror) <= set(range(AXES)):
        raise ConfigError(f"volumes: mirror = {tuple(mirror)}: wanted different axes of 0, 1, 2")
    files = open_volumes(data_dir, None if split == "train" else split, unconditional)
    shape = Volumes(files, limits)[0]["x"].shape
    space = Space(shape, Conditions.labels(len(files.classes), files.classes))
    return Dataset(Volumes(files, limits, shape), partial(mirrored, axes=mirror) if mirror else None, space)
