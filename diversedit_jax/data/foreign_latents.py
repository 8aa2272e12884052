"""Latents as other projects store them, [2k h w] in torch's order, as examples like those of `data.latents`.

Used by one module for each layout: `repa`, `edm2`, `meanflow_lmdb`, `meanflow_pt`, `lightningdit`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, image_collections
from diversedit_jax.data.image_collections import INDEX, ImageFiles
from diversedit_jax.data.latents import chosen, flip, label_of
from diversedit_jax.errors import ConfigError, DataError, check_machine
from diversedit_jax.reading import parse_npy, read_json
from diversedit_jax.registry import one_of

LOGVAR = (-30.0, 20.0)  # published code clips log variances to this range


class Record(NamedTuple):
    """One image as stored. moments: [v 2k h w]; v = 2 with the mirror image, else 1. image: uint8 [H W c]."""

    moments: np.ndarray
    label: int
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Stored:
    """Examples by index: `moments` float32 [h w 2k], means, then standard deviations; `y`; `image` if it is read.

    read: index -> Record. kind: of the second half of the stored moments, `std` or `logvar`.
    num_classes: if 0, labels are not read. both: as in `latents.Moments`.
    normalise: (mean, std) [k], which standardise the channels, or None. shape: [h w 2k] of every record; (): any.
    """

    name: str
    count: int
    read: Callable[[int], Record]
    kind: str
    num_classes: int
    both: bool
    normalise: tuple[np.ndarray, np.ndarray] | None = None
    shape: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._example(self.read(index))
        except Exception as error:
            check_machine(error)
            text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            raise DataError(f"{self.name}, record {index}: {text}") from error

    def _example(self, record: Record) -> dict[str, Any]:
        y = label_of(record.label if self.num_classes else 0, self.num_classes)
        moments = np.moveaxis(np.asarray(record.moments, np.float32), 1, -1)
        if self.shape and moments.shape[1:] != self.shape:
            raise DataError(f"moments {list(moments.shape[1:])}, those of record 0 are {list(self.shape)}")
        if not np.isfinite(moments).all():
            raise DataError("moments that are not finite")
        mean, second = np.split(moments, 2, axis=-1)
        std = deviations(second, self.kind)
        if self.normalise is not None:
            mean, std = (mean - self.normalise[0]) / self.normalise[1], std / self.normalise[1]
        example = {"moments": np.concatenate([mean, std], axis=-1), "y": y}
        if record.image is not None:
            example["image"] = record.image
        return example if self.both else chosen(example, False)


def deviations(second: np.ndarray, kind: str) -> np.ndarray:
    """Standard deviations from the second half of stored moments. DataError if they are of the other kind."""
    least = second.min()
    if kind == "logvar" and least > 0:
        raise DataError(f"log variances of at least {least:.3g}: are these standard deviations? Set kind='std'")
    if kind == "std" and least < 0:
        raise DataError(f"a standard deviation of {least:.3g}: are these log variances? Set kind='logvar'")
    return second if kind == "std" else np.exp(0.5 * np.clip(second, *LOGVAR))


def dataset(
    name: str,
    count: int,
    read: Callable[[int], Record],
    *,
    num_classes: int,
    scale: float,
    kind: str = "std",
    mirror: bool = False,
    normalise: tuple[np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    """The data set of these records. The first is read now, for the shape. scale: as in `Dataset`; others: `Stored`."""
    one_of(f"{name}: kind", kind, ("std", "logvar"))
    if not count:
        raise DataError(f"{name}: it is empty")
    source = Stored(name, count, read, kind, num_classes, mirror, normalise)
    moments = source[0]["moments"]
    if moments.ndim != 3 + mirror or (mirror and len(moments) != 2):
        raise DataError(f"{name}: moments of shape {list(moments.shape)}: wanted [h w 2k]" + (", twice" * mirror))
    *_, h, w, channels = moments.shape
    for option, values in zip(("mean", "std"), normalise or (), strict=bool(normalise)):
        if len(values) not in (1, channels // 2):
            raise ConfigError(f"{name}: {option} has {len(values)} values, the latents have {channels // 2} channels")
    source = replace(source, shape=(h, w, channels))
    space = Space((h, w, channels // 2), Conditions.labels(num_classes))
    return Dataset(source, flip if mirror else None, space, scale)


def no_mirror(name: str, mirror: bool) -> None:
    """Raise ConfigError for a mirror where the layout holds no latents of mirror images."""
    if mirror:
        raise ConfigError(f"{name}: this layout has no latents of mirror images; tools.prepare_latents makes both")


def no_splits(name: str, split: str) -> None:
    """Raise ConfigError for another split than `train` if the layout has none."""
    if split != "train":
        raise ConfigError(f"{name}: no split {split!r}; the only one is 'train'")


def of_split(name: str, path: Path, split: str) -> Path:
    """The subfolder of a split; for `train` the path itself if there is no such folder."""
    if (path / split).is_dir():
        return path / split
    no_splits(name, split)
    return path


@dataclass(frozen=True)
class NpyReader:
    """index -> Record from .npy files, labels by name and, if they are read, images in the same order.

    read: index -> the content of the file names[index].
    """

    names: Sequence[str]
    labels: Mapping[str, int]
    read: Callable[[int], bytes]
    images: ImageFiles | None = None

    def __call__(self, index: int) -> Record:
        moments = parse_npy(self.read(index))[None]
        image = None if self.images is None else image_collections.image_of(self.images, index)
        return Record(moments, self.labels.get(self.names[index], 0), image)

    def classes(self, num_classes: int | None) -> int:
        """Number of classes: as given; by default one more than the largest label, or 0 without labels."""
        if num_classes and not self.labels:
            raise DataError(f"num_classes is {num_classes}, but {INDEX} has no labels; 0 trains without classes")
        return max(self.labels.values(), default=-1) + 1 if num_classes is None else num_classes


def npy_files(name: str, path: Path) -> NpyReader:
    """The .npy files that the labels of a folder's or zip's dataset.json list, or all if labels are null; sorted."""
    missing = DataError(f'{name}: {path} has no {INDEX}: {{"labels": [[file, class], ...]}}')
    if path.is_dir():
        try:
            labels = image_collections.index_labels(read_json(path / INDEX))
        except FileNotFoundError:
            raise missing from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            check_machine(error)
            raise DataError(f"{name}: {path / INDEX} cannot be read: {type(error).__name__}: {error}") from error
        names = labels or [file.relative_to(path).as_posix() for file in path.rglob("*.npy")]
    elif path.is_file():
        names, labels = image_collections.zip_index(path)
        if labels is None:
            raise missing
        names = labels or names
    else:
        raise DataError(f"{name}: {path} does not exist")
    names = sorted(file for file in names if file.lower().endswith(".npy"))
    read = partial(image_collections.read_file, path, names)
    return NpyReader(names, labels, read if path.is_dir() else image_collections.ZipReader(path, names))
