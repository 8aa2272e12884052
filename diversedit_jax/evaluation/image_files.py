"""Finished images in the files that evaluators exchange: an .npz with `arr_0`, or a folder of images of one size.

An array may have videos or volumes, too.
"""

import hashlib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diversedit_jax.data import image_collections, local_path
from diversedit_jax.errors import DataError, check_machine
from diversedit_jax.reading import RegularFile, checksum, member_start, npy_header, parse_npy, read_member, zip_members
from diversedit_jax.weights.formats.weights_file import file_digest

ARRAY = "arr_0"


class SampleFiles(NamedTuple):
    """Images on disk, in the order of the file or of the names. shape: (*s, c) of each.

    path: of the file or folder that holds them, with the split if that is a folder.
    read: (first, count) -> uint8 [count *s c].
    digest: () -> sha256 in hex: of the content of a file, or of the names, sizes and times in a folder.
    """

    path: Path
    count: int
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]
    digest: Callable[[], str]


def open_samples(path: str | Path) -> SampleFiles:
    """Open the images in an .npz or .npy, or in a folder, tar or zip of images. DataError, in one line, otherwise."""
    path = local_path("samples", path)
    if not path.exists():
        raise DataError(f"samples: {path} does not exist")
    if path.suffix in (".npz", ".npy"):
        return of_array(path, stored_array(path, ARRAY))
    if path.is_file() and path.suffix not in (".tar", ".zip"):
        raise DataError(f"samples: {path} is neither an .npz with {ARRAY} nor a folder, .tar or .zip of images")
    return _of_images(path)


def of_array(path: Path, images: np.ndarray) -> SampleFiles:
    """The images of an array. DataError if it is not uint8 [n h w 1 or 3], or [n f h w 1 or 3]. path: of its file."""
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] not in (1, 3) or not images.size:
        swapped = images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3)
        given = f"{images.dtype} {list(images.shape)}"
        raise DataError(f"{path}: {ARRAY} is {given}: wanted {'the channels last, ' * swapped}uint8 [n h w 3]")

    def read(first: int, count: int) -> np.ndarray:
        return np.array(images[first : first + count])

    return SampleFiles(path, len(images), images.shape[1:], read, partial(_digest, path))


def _digest(path: Path) -> str:
    if path.is_file():
        return file_digest(path)
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            stat = file.stat()
            found.update(f"{file.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()


def stored_array(path: Path, name: str) -> np.ndarray:
    """An array of an .npz, or of an .npy. If it is not compressed, it is verified, and mapped from the file.

    An .npz has a checksum of each array; an .npy has none.
    """
    if path.suffix != ".npy":
        check_zip(path)
    try:
        with RegularFile(path) as file:
            if path.suffix == ".npy":
                return _mapped(path, file, file.size)
            members = zip_members(file)
            if (info := members.get(f"{name}.npy")) is None:
                known = ", ".join(member.removesuffix(".npy") for member in members) or "nothing"
                raise DataError(f"{path}: no array {name}, it holds {_shown(known)}")
            if info.compress_type != zipfile.ZIP_STORED:
                return parse_npy(read_member(file, info))
            start = member_start(file, info)
            if info.compress_size != info.file_size or checksum(file, start, info.file_size) != info.CRC:
                raise ValueError(f"{name} is damaged: its checksum is wrong")
            file.seek(start)
            return _mapped(path, file, info.file_size)
    except (OSError, ValueError, MemoryError) as error:
        check_machine(error)
        raise DataError(f"{path}: cannot be read: {_shown(str(error))}") from error


def _shown(text: str) -> str:
    """Text of a file on one line."""
    return text.encode("unicode_escape").decode()


def check_zip(path: Path) -> None:
    """Raise DataError, with the first bytes, if a file is not an .npz: for example a web page or half a download."""
    if path.is_dir():
        raise DataError(f"{path}: a folder, wanted a file .npz")
    try:
        with RegularFile(path) as file:
            if zipfile.is_zipfile(file):
                return
            file.seek(0)
            begin = file.read(24)
    except OSError as error:
        check_machine(error)
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    why = "truncated" if begin.startswith(b"PK") else f"begins with {begin}" if begin else "empty"
    raise DataError(f"{path}: not an .npz file: {why}")


def _mapped(path: Path, file: RegularFile, nbytes: int) -> np.ndarray:
    """The array that fills `nbytes` of an open file from here on, as a view of the file."""
    shape, order, dtype = npy_header(file, nbytes)
    if not np.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", file.tell(), shape, order)


def _of_images(path: Path) -> SampleFiles:
    images = image_collections.open_images(path, unconditional=True)

    def decoded(index: int) -> np.ndarray:
        try:
            return image_collections.image_of(images, index)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    shape = decoded(0).shape

    def read(first: int, count: int) -> np.ndarray:
        try:
            with ThreadPoolExecutor() as pool:
                found = list(pool.map(decoded, range(first, min(first + count, len(images)))))
        except RuntimeError as error:
            check_machine(error)
            raise
        for index, image in enumerate(found, first):
            if image.shape != shape:
                (h, w, _), (h0, w0, _) = image.shape, shape
                sizes = f"{images.keys[index]} has {h} x {w} pixels, {images.keys[0]} {h0} x {w0} pixels"
                raise DataError(f"{path}: {sizes}: wanted images of one size")
        return np.stack(found)

    return SampleFiles(images.path, len(images), shape, read, partial(_digest, images.path))
