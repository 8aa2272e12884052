"""Latents as a port of MeanFlow to PyTorch keeps them (github.com/zhuyu-cs/MeanFlow, dataset.py): an LMDB of pickles.

    num_samples   the number of images, in digits
    0, 1, ...     a pickled dict: `moments` and `moments_flip`, float32 [8 h w], means, then LOG VARIANCES, of the image
                  and of its mirror image; `label`, `filename`

Needs the package lmdb (`pip install -e .[lmdb]`). No pickle is run: arrays are put together here, and any other object
in it is refused by name.
"""

import io
import os
import pickle
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.data import Dataset, local_path, stored
from diversedit_jax.data.stored import Record
from diversedit_jax.errors import ConfigError, DataError

DTYPES = ("f2", "f4", "f8")


class PickledDtype:
    """What a pickle calls a dtype."""

    def __init__(self, name: str, *flags: Any):
        if name not in DTYPES:
            raise pickle.UnpicklingError(f"an array of dtype {str(name)[:20]!r}, wanted one of {', '.join(DTYPES)}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def array(self, content: bytes | bytearray, shape: tuple[int, ...], order: str) -> np.ndarray:
        """The array of these numbers."""
        return np.frombuffer(content, f"{self.order}{self.name}").reshape(shape, order=order)


class PickledArray:
    """What a pickle calls an array."""

    def __init__(self, *arguments: Any):
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.value = dtype.array(content, shape, "F" if fortran else "C")


def from_buffer(content: bytes | bytearray, dtype: PickledDtype, shape: tuple[int, ...], order: str) -> PickledArray:
    """An array as later versions of pickle have it."""
    array = PickledArray()
    array.value = dtype.array(content, shape, order)
    return array


KNOWN = {
    "multiarray._reconstruct": PickledArray,
    "numeric._frombuffer": from_buffer,
    "ndarray": PickledArray,
    "dtype": PickledDtype,
}


class Unpickler(pickle.Unpickler):
    """Reads dicts, numbers, strings and arrays; names nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        inside = module.removeprefix("numpy").removeprefix(".core").removeprefix("._core").strip(".")
        known = KNOWN.get(f"{inside}.{name}".strip("."))
        if known is None or module.partition(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return known

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names a persistent object")


def entry(content: bytes) -> dict[str, Any]:
    """A record of the database; DataError for anything but a dict of arrays, numbers and strings."""
    try:
        found = Unpickler(io.BytesIO(content)).load()
        return {name: value.value if isinstance(value, PickledArray) else value for name, value in found.items()}
    except Exception as error:
        raise DataError(f"its pickle cannot be read: {error}") from error


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
    path = local_path("meanflow_lmdb", data_dir)
    reader = Reader(path, mirror)
    try:
        count = int(reader.get("num_samples"))
    except (DataError, ValueError) as error:
        raise DataError(f"meanflow_lmdb: {path} is not such a database: {error}") from error
    return stored.dataset(
        f"meanflow_lmdb: {path}",
        count,
        reader,
        kind="logvar",
        num_classes=num_classes,
        mirror=mirror,
        scale=0.18215,
    )
