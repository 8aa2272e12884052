"""CIFAR-10 (Krizhevsky, 2009) from its authors' binary version: 50,000 colour photographs of 32 x 32 pixels in ten
classes, and 10,000 as `test`.

    cifar-10-binary.tar.gz    or, unpacked,    data_batch_1.bin .. data_batch_5.bin  test_batch.bin

A record is a label and the red, the green and the blue plane, one byte each.
"""

import hashlib
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, local_path
from diversedit_jax.data.levels import Levels, flip, shrunk
from diversedit_jax.errors import DataError, check_machine
from diversedit_jax.reading import BLOCK, RegularFile
from diversedit_jax.registry import one_of

SPLITS = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
ARCHIVE, FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of the archive
SHAPE, COUNT = (3, 32, 32), 10_000  # COUNT: records of a file
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def make(split: str, *, data_dir: str, size: int = 32, mirror: bool = False) -> Dataset:
    """The images in `data_dir`: `x` float32 [size size 3] in [-1, 1], and `y`.

    data_dir: the archive, or a folder with it or with the unpacked files.
    size: 32, or 16 or 8: means of 2 x 2 or 4 x 4 pixels. mirror: each draw takes the mirror image with probability 1/2.

    DataError if they are missing or damaged. The archive must be that of the authors, to the bit.
    """
    names = SPLITS[one_of("cifar10: split", split, SPLITS)]
    contents = _contents(local_path("cifar10", data_dir))
    record = 1 + int(np.prod(SHAPE))
    parts = []
    for name in names:
        if (content := contents.get(name)) is None:
            raise DataError(f"cifar10: {data_dir} has no {name}: wanted {ARCHIVE}, or the files in it")
        if len(content) != COUNT * record:
            raise DataError(f"cifar10: {name} has {len(content)} bytes, wanted {COUNT * record}")
        parts.append(np.frombuffer(content, np.uint8).reshape(COUNT, record))
    records = np.concatenate(parts)
    labels = records[:, 0].astype(np.int32)
    if labels.max() >= len(CLASSES):
        raise DataError(f"cifar10: record {labels.argmax()} of {split} has the label {labels.max()}: wanted 0 .. 9")
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, *SHAPE).transpose(0, 2, 3, 1))
    levels = Levels(shrunk("cifar10: size", images, size), labels)
    space = Space(levels.images.shape[1:], Conditions.labels(len(CLASSES), CLASSES))
    return Dataset(levels, flip if mirror else None, space)


def _contents(path: Path) -> Mapping[str, bytes]:
    """The files of the data set by name."""
    wanted = {name for names in SPLITS.values() for name in names}
    try:
        for folder in (path, path / FOLDER):
            if folder.is_dir() and (here := [name for name in sorted(wanted) if (folder / name).exists()]):
                return {name: _file(folder / name) for name in here}
        return _unpacked(path / ARCHIVE if path.is_dir() else path, wanted)
    except FileNotFoundError:
        raise DataError(f"cifar10: {path} has neither {ARCHIVE} nor the files in it") from None
    except (OSError, ValueError, EOFError, tarfile.TarError) as error:
        check_machine(error)
        raise DataError(f"cifar10: cannot read {path}: {error}") from error


def _file(path: Path) -> bytes:
    with RegularFile(path) as file:
        return file.read()


def _unpacked(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """The members of the archive, if it is the published one: then they need no further check."""
    with RegularFile(path) as file:
        found = hashlib.md5(usedforsecurity=False)
        while block := file.read(BLOCK):
            found.update(block)
        if found.hexdigest() != MD5:
            raise ValueError(f"its md5 is {found.hexdigest()}, and that of {ARCHIVE} is {MD5}")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r|gz") as archive:
            members = ((Path(member.name).name, archive.extractfile(member)) for member in archive if member.isfile())
            return {name: member.read() for name, member in members if name in wanted}
