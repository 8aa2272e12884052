"""Latents as a port of MeanFlow to PyTorch keeps them (github.com/zhuyu-cs/MeanFlow, dataset.py): an LMDB of pickles.

    num_samples   the number of images, in digits
    0, 1, ...     a pickled dict: `moments` and `moments_flip`, float32 [8 h w], means, then LOG VARIANCES, of the image
                  and of its mirror image; `label`, `filename`

No code in a pickle is run: `weights.formats.numpy_pickle` builds arrays, and refuses any other object by name.
"""

from dataclasses import dataclass

import numpy as np

from diversedit_jax.data import Dataset, foreign_latents, label, local_path
from diversedit_jax.data.foreign_latents import Record
from diversedit_jax.data.latents import told_classes
from diversedit_jax.data.lmdb_file import Database, open_database
from diversedit_jax.errors import DataError, check_machine
from diversedit_jax.weights.formats import numpy_pickle


@dataclass(frozen=True)
class Reader:
    """index -> Record, from many threads and processes."""

    database: Database
    both: bool

    def get(self, key: str) -> bytes:
        value = self.database.get(key.encode())
        if value is None:
            raise DataError(f"no key {key!r}")
        return value

    def __call__(self, index: int) -> Record:
        found = numpy_pickle.load(self.get(str(index)))
        names = ("moments", "moments_flip") if self.both else ("moments",)
        return Record(np.stack([found[name] for name in names]), label(found["label"]))


def make(split: str, *, data_dir: str, num_classes: int | None = None, mirror: bool = False) -> Dataset:
    """The latents in the database `data_dir`, without splits.

    data_dir: the folder of the database.
    num_classes: needed, since the database does not say it. mirror: draw mirror images with probability 1/2.
    """
    foreign_latents.no_splits("meanflow_lmdb", split)
    path = local_path("meanflow_lmdb", data_dir)
    try:
        reader = Reader(open_database(path), mirror)
        count = int(reader.get("num_samples"))
    except (DataError, OSError, ValueError) as error:
        check_machine(error)
        raise DataError(f"meanflow_lmdb: {path} is not such a database: {error}") from error
    classes = told_classes(f"meanflow_lmdb: {path}", num_classes)
    return foreign_latents.dataset(
        f"meanflow_lmdb: {path}", count, reader, num_classes=classes, scale=0.18215, kind="logvar", mirror=mirror
    )
