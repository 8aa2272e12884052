"""Latents as a port of MeanFlow to PyTorch keeps them (github.com/zhuyu-cs/MeanFlow, dataset.py): an LMDB of pickles.

    num_samples   the number of images, in digits
    0, 1, ...     a pickled dict: `moments` and `moments_flip`, float32 [8 h w], means, then LOG VARIANCES, of the image
                  and of its mirror image; `label`, `filename`

Needs the package lmdb (`pip install -e .[lmdb]`). No code in a pickle is run: `weights.formats.numpy_pickle` builds
arrays, and refuses any other object by name.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.data import Dataset, foreign_latents, local_path
from diversedit_jax.data.foreign_latents import Record
from diversedit_jax.data.latents import told_classes
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.weights.formats import numpy_pickle


@dataclass(frozen=True)
class Reader:
    """index -> Record, from many threads and processes."""

    path: Path
    both: bool

    def get(self, key: str) -> bytes:
        with environment(self.path).begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise DataError(f"no key {key!r}")
        return value

    def __call__(self, index: int) -> Record:
        found = numpy_pickle.load(self.get(str(index)))
        names = ("moments", "moments_flip") if self.both else ("moments",)
        return Record(np.stack([found[name] for name in names]), int(found["label"]))


_opened: dict[tuple[int, Path], Any] = {}
_lock = threading.Lock()


def environment(path: Path) -> Any:
    """The database, opened for reading. LMDB allows a process to open it only once."""
    try:
        import lmdb  # an optional package
    except ImportError:
        raise ConfigError("meanflow_lmdb: the package lmdb is not installed: pip install -e .[lmdb]") from None
    key = (os.getpid(), path.resolve())
    with _lock:
        if key not in _opened:
            try:
                options = {"subdir": path.is_dir(), "lock": False, "readahead": False, "meminit": False}
                _opened[key] = lmdb.open(str(path), readonly=True, **options)
            except lmdb.Error as error:
                raise DataError(f"meanflow_lmdb: {path} cannot be opened: {error}") from error
        return _opened[key]


def make(split: str, *, data_dir: str, num_classes: int | None = None, mirror: bool = False) -> Dataset:
    """The latents in the database `data_dir`, without splits.

    num_classes: needed, since the database does not say it. mirror: draw mirror images with probability 1/2.
    """
    foreign_latents.no_splits("meanflow_lmdb", split)
    path = local_path("meanflow_lmdb", data_dir)
    reader = Reader(path, mirror)
    try:
        count = int(reader.get("num_samples"))
    except (DataError, ValueError) as error:
        raise DataError(f"meanflow_lmdb: {path} is not such a database: {error}") from error
    classes = told_classes(f"meanflow_lmdb: {path}", num_classes)
    return foreign_latents.dataset(
        f"meanflow_lmdb: {path}", count, reader, num_classes=classes, scale=0.18215, kind="logvar", mirror=mirror
    )
