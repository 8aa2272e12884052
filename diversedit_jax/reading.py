"""Read files that come from outside: regular files only, verified, and in no more memory than they can fill.

Damaged content is a ValueError, and a file that cannot be opened is an OSError. Callers name the file, in an error of
their own class.
"""

import errno
import io
import json
import math
import os
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of compression in a zip
# A member of a zip may unpack to INFLATED bytes, a larger one to RATIO times its size. dataset.json has about 10 times.
INFLATED, RATIO = 1 << 24, 32
NPY_VERSIONS = ((1, 0), (2, 0), (3, 0))
# numpy reads headers by Python's parser. In Python 3.11 two threads in it get a SystemError if one of them collects
# garbage there and runs a callback, such as that of jax.
PARSER = threading.Lock()
BLOCK = 1 << 22


class RegularFile(io.BufferedReader):
    """A regular file, open for reading. OSError for all others: reading a pipe might never end.

    A read never allocates more bytes than the file has left: how many are asked for may be a number in the file.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(io.FileIO(path, opener=_regular))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self.size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(4096)  # pickles read lines: names, which are short


def _regular(path: str | os.PathLike, flags: int) -> int:
    """Open a regular file. Without O_NONBLOCK, opening a pipe would wait for one who writes."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", path)
    raise OSError(errno.EINVAL, "is not a regular file", path)


def check_folder(path: Path) -> None:
    """Raise ValueError if something in or below a folder is neither a file nor a folder. Libraries would open it."""
    for entry in path.rglob("*"):
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise ValueError(f"{entry} is not a regular file")


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file."""
    with RegularFile(path) as file:
        return parse_json(file.read())


def parse_json(content: str | bytes) -> Any:
    """The value of JSON text."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def zip_members(file: RegularFile) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name, in the order of its directory."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos, announced = archive.infolist(), _announced(file, archive.comment)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"a truncated or damaged zip archive: {error}") from error
    if announced not in (len(infos) % 2**16, 2**16 - 1):  # a damaged entry may swallow the next ones
        raise ValueError(f"a damaged zip archive: it announces {announced} entries and has {len(infos)}")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        if info.filename in members:
            raise ValueError(f"two entries {info.filename}")
        members[info.filename] = info
    return members


def _announced(file: RegularFile, comment: bytes) -> int:
    """How many entries the end of a zip announces, modulo 2^16. comment: of the archive, behind that."""
    for size in (22 + len(comment), 22 + 2**16):  # what follows may be longer than the comment that zipfile found
        file.seek(max(file.size - size, 0))
        end = file.read()
        if (place := end.rfind(b"PK\5\6")) >= 0:
            return int.from_bytes(end[place + 10 : place + 12], "little")
    return -1


def member_start(file: RegularFile, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member start: after its own header, which repeats the name and adds padding."""
    if 0 <= info.header_offset < file.size:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) == 30 and header.startswith(b"PK\x03\x04"):
            name, extra = struct.unpack("<HH", header[26:])
            if file.read(name) == info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
                return info.header_offset + 30 + name + extra
    raise ValueError(f"damaged in the zip: no header of entry {info.filename} where it should be")


def read_member(file: RegularFile, info: zipfile.ZipInfo) -> bytes:
    """The content of a member of a zip. Its size and its checksum are verified."""
    if info.compress_type not in METHODS:
        raise ValueError(f"compressed by method {info.compress_type}: wanted none, or deflate")
    if info.file_size > max(INFLATED, RATIO * info.compress_size):
        raise ValueError(f"{info.file_size} bytes packed in {info.compress_size}: wanted at most {RATIO} times as many")
    file.seek(member_start(file, info))
    content = file.read(info.compress_size)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, info.file_size + 1)
        except zlib.error as error:
            raise ValueError(f"damaged in the zip: {error}") from error
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise ValueError("damaged in the zip: its size or checksum is wrong")
    return content


def checksum(file: RegularFile, start: int, nbytes: int) -> int:
    """The CRC-32 of a part of a file."""
    file.seek(start)
    found, end = 0, start + nbytes
    while block := file.read(min(BLOCK, end - file.tell())):
        found = zlib.crc32(block, found)
    return found


def npy_header(file: io.BufferedIOBase, nbytes: int) -> tuple[tuple[int, ...], str, np.dtype]:
    """Shape, order (C or F) and dtype of an array in the format .npy, which fills `nbytes` of the file from here on."""
    start = file.tell()
    try:
        version = np.lib.format.read_magic(file)
        if version not in NPY_VERSIONS:
            raise ValueError(f"version {version}")
        form = np.lib.format
        header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        with PARSER:
            shape, fortran, dtype = header(file)
    except OSError:
        raise
    except Exception as error:  # Python's parser raises many kinds, also MemoryError for what is nested too deeply
        raise ValueError(f"no header of an array: {error}".partition("\n")[0]) from error
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    left = start + nbytes - file.tell()
    if min(shape, default=0) < 0 or (given := math.prod(shape) * dtype.itemsize) > left:
        raise ValueError(f"it is truncated: {dtype} {list(shape)} does not fit in {left} bytes")
    if given < left:
        raise ValueError(f"{left - given} bytes follow its array {dtype} {list(shape)}")
    return shape, "F" if fortran else "C", dtype


def parse_npy(content: bytes) -> np.ndarray:
    """The array of a file .npy, as a read-only view."""
    file = io.BytesIO(content)
    shape, order, dtype = npy_header(file, len(content))
    return np.ndarray(shape, dtype, content, file.tell(), order=order)


class Npz(Mapping):
    """The arrays of an open .npz by name, each read and verified when it is asked for."""

    def __init__(self, path: str | os.PathLike):
        self._file = RegularFile(path)
        try:
            members = zip_members(self._file)
            for info in members.values():  # a name with a damaged bit would be another array's, or none
                member_start(self._file, info)
        except BaseException:
            self._file.close()
            raise
        self._members = {name.removesuffix(".npy"): info for name, info in members.items() if name.endswith(".npy")}

    def __getitem__(self, name: str) -> np.ndarray:
        info = self._members[name]
        try:
            return parse_npy(read_member(self._file, info))
        except ValueError as error:
            raise ValueError(f"array {name}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
