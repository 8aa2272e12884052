"""Latents as a port of MeanFlow to PyTorch keeps them (github.com/zhuyu-cs/MeanFlow, dataset.py): an LMDB of pickles.

    num_samples   the number of images, in digits
    0, 1, ...     a pickled dict: `moments` and `moments_flip`, float32 [8 h w], means, then LOG VARIANCES, of the image
                  and of its mirror image; `label`, `filename`

Needs the package lmdb (`pip install -e .[lmdb]`). No pickle is run: `weights.formats.numpy_pickle` puts arrays
together, and refuses any other object by name.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.data import Dataset, foreign_latents, local_path
from diversedit_jax.data.foreign_latents import Record
from diversedit_jax.errors import ConfigError, DataError, WeightsError
from diversedit_jax.weights.formats import numpy_pickle


def entry(content: bytes) -> dict[str, Any]:
    """A record of the database; DataError for anything but a dict of arrays, numbers and strings."""
    try:
        return numpy_pickle.load(content)
    except WeightsError as error:
        raise DataError(str(error)) from error


@dataclass(frozen=True)
class Reader:
    """index -> Record, from many threads and processes."""

    path: Path
    both: bool

    def get(self, key: str) -> bytes:
        """The value of a key; DataError if there is none."""
        with environment(self.path).begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise DataError(f"no key {key!r}")
        return value

    def __call__(self, index: int) -> Record:
        found = entry(self.get(str(index)))
        names = ("moments", "moments_flip") if self.both else ("moments",)
        return Record(np.stack([found[name] for name in names]), int(found["label"]))


_opened: dict[tuple[int, Path], Any] = {}
_lock = threading.Lock()


def environment(path: Path) -> Any:
    """The database, opened to read from: once in each process, which is all that LMDB allows."""
    try:
        import lmdb  # for this layout only
    except ImportError:
        raise ConfigError("meanflow_lmdb: the package lmdb is not installed: pip install -e .[lmdb]") from None
    key = (os.getpid(), path.resolve())
    with _lock:
        if key not in _opened:
            if not path.exists():
                raise DataError(f"meanflow_lmdb: {path} does not exist")
            try:
                options = {"subdir": path.is_dir(), "lock": False, "readahead": False, "meminit": False}
                _opened[key] = lmdb.open(str(path), readonly=True, **options)
            except lmdb.Error as error:
                raise DataError(f"meanflow_lmdb: {path} cannot be opened: {error}") from error
        return _opened[key]


def make(split: str, *, data_dir: str, num_classes: int = 1000, mirror: bool = False) -> Dataset:
    """The latents in the database `data_dir`, which has no splits.

    mirror: each draw takes the mirror image with probability 1/2.
    """
    foreign_latents.no_splits("meanflow_lmdb", split)
    path = local_path("meanflow_lmdb", data_dir)
    reader = Reader(path, mirror)
    try:
        count = int(reader.get("num_samples"))
    except (DataError, ValueError) as error:
        raise DataError(f"meanflow_lmdb: {path} is not such a database: {error}") from error
    return foreign_latents.dataset(
        f"meanflow_lmdb: {path}",
        count,
        reader,
        kind="logvar",
        num_classes=num_classes,
        mirror=mirror,
        scale=0.18215,
    )
