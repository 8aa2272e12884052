"""Latents as other projects store them, [2k h w] in torch's order, become examples as `data.latents` gives them.

Each layout is a file of its own beside this one: `repa`, `edm2`, `meanflow_lmdb`, `meanflow_pt`, `lightningdit`.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, image_collections
from diversedit_jax.data.latents import chosen, flip
from diversedit_jax.errors import ConfigError, DataError

KINDS = ("std", "logvar")
LOGVAR = (-30.0, 20.0)  # to which published code clips the log variance


class Record(NamedTuple):
    """One image as it is stored: moments [v 2k h w], of the image and, if v = 2, of its mirror image."""

    moments: np.ndarray
    label: int
    image: np.ndarray | None = None  # uint8 [H W c]


@dataclass(frozen=True)
class Stored:
    """Examples by index: `moments` float32 [h w 2k], means, then standard deviations; `y`; `image` where it is read.

    read: index -> Record. kind: of the second half as it is stored. normalise: (mean, std) [k] of the latents that are
    taken out of them, or None. shape: [h w 2k] of every record, if it is known. num_classes: if 0, labels are not read.
    both: as in `latents.Moments`.
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
            text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            raise DataError(f"{self.name}, record {index}: {text}") from error

    def _example(self, record: Record) -> dict[str, Any]:
        label = record.label if self.num_classes else 0
        if not 0 <= label < max(self.num_classes, 1):
            raise DataError(f"label {label} is not in 0 .. {self.num_classes - 1}")
        moments = np.moveaxis(np.asarray(record.moments, np.float32), 1, -1)
        if self.shape and moments.shape[1:] != self.shape:
            raise DataError(f"moments {list(moments.shape[1:])}, those of record 0 are {list(self.shape)}")
        if not np.isfinite(moments).all():
            raise DataError("moments that are not finite")
        mean, second = np.split(moments, 2, axis=-1)
        std = deviations(second, self.kind)
        if self.normalise is not None:
            mean, std = (mean - self.normalise[0]) / self.normalise[1], std / self.normalise[1]
        example = {"moments": np.concatenate([mean, std], axis=-1), "y": np.int32(label)}
        if record.image is not None:
            example["image"] = record.image
        return example if self.both else chosen(example, False)


def deviations(second: np.ndarray, kind: str) -> np.ndarray:
    """Standard deviations from what is stored: themselves, or the logarithms of their squares."""
    if kind == "logvar":
        if second.min() > 0:
            raise DataError(
                f"log variances of at least {second.min():.3g}: are these standard deviations? Set kind='std'"
            )
        return np.exp(0.5 * np.clip(second, *LOGVAR))
    if second.min() < 0:
        raise DataError(f"a standard deviation of {second.min():.3g}: are these log variances? Set kind='logvar'")
    return second


def dataset(
    name: str,
    count: int,
    read: Callable[[int], Record],
    *,
    kind: str,
    num_classes: int,
    mirror: bool,
    scale: float | None,
    normalise: tuple[np.ndarray, np.ndarray] | None = None,
) -> Dataset:
    """The data set of these records; the first is read now, for the shape. scale: as in `Dataset`."""
    if kind not in KINDS:
        raise ConfigError(f"{name}: kind = {kind!r}: wanted one of {', '.join(KINDS)}")
    if not count:
        raise DataError(f"{name}: it is empty")
    source = Stored(name, count, read, kind, num_classes, mirror, normalise)
    moments = source[0]["moments"]
    if moments.ndim != 3 + mirror or (mirror and len(moments) != 2):
        raise DataError(f"{name}: moments of shape {list(moments.shape)}: wanted [h w 2k]" + (", twice" * mirror))
    *_, h, w, channels = moments.shape
    source = replace(source, shape=(h, w, channels))
    space = Space((h, w, channels // 2), Conditions.labels(num_classes))
    return Dataset(source, flip if mirror else None, space, scale)


def no_mirror(name: str, mirror: bool) -> None:
    """Raise ConfigError for a mirror where the layout holds no latents of mirror images."""
    if mirror:
        raise ConfigError(
            f"{name}: mirror: this layout has no latents of mirror images; tools.prepare_latents makes both"
        )


class Files(NamedTuple):
    """Files of a folder or a zip, and the labels that its dataset.json gives them; none without classes."""

    names: Sequence[str]
    labels: Mapping[str, int]
    read: Callable[[str], bytes]


def no_splits(name: str, split: str) -> None:
    """Raise ConfigError for another split than `train` where the layout has none: it would be the training data."""
    if split != "train":
        raise ConfigError(f"{name}: no split {split!r}: all that is there is 'train'")


def of_split(name: str, path: Path, split: str) -> Path:
    """The subfolder of a split; the path itself for `train` where there is no such folder."""
    if not (path / split).is_dir():
        no_splits(name, split)
        return path
    return path / split


def labelled(what: str, path: Path, suffix: str) -> Files:
    """The files of a suffix in a folder or a zip with dataset.json, sorted by name: the index alone lists them.

    Where its labels are null, there are no classes: labels are empty, and the files are listed once.
    Raises DataError for a missing or damaged index.
    """
    if path.is_dir():
        try:
            listed = json.loads((path / image_collections.INDEX).read_text(encoding="utf-8"))["labels"]
            labels = {str(name): int(label) for name, label in listed or ()}
        except FileNotFoundError:
            raise DataError(
                f'{what}: {path} has no {image_collections.INDEX}: {{"labels": [[file, class], ...]}}'
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            kind = type(error).__name__
            raise DataError(f"{what}: {path / image_collections.INDEX} cannot be read: {kind}: {error}") from error
        names = labels or [file.relative_to(path).as_posix() for file in path.rglob(f"*{suffix}")]
        read = partial(_read, path)
    elif path.is_file():
        names, labels = image_collections.zip_index(path)
        if image_collections.INDEX not in names:
            raise DataError(f'{what}: {path} has no {image_collections.INDEX}: {{"labels": [[file, class], ...]}}')
        names, labels = labels or names, labels or {}
        read = image_collections.ZipReader(path)
    else:
        raise DataError(f"{what}: {path} does not exist")
    return Files(sorted(name for name in names if name.lower().endswith(suffix)), labels, read)


def _read(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def array(content: bytes) -> np.ndarray:
    """The array of a .npy file; nothing in it is run."""
    return np.load(io.BytesIO(content), allow_pickle=False)


def classes(labels: Mapping[str, int], num_classes: int | None) -> int:
    """Number of classes: as it is given, else one more than the largest label, and 0 without any."""
    if num_classes and not labels:
        raise DataError(
            f"num_classes is {num_classes}, but {image_collections.INDEX} has no labels; 0 trains without classes"
        )
    return max(labels.values(), default=-1) + 1 if num_classes is None else num_classes
