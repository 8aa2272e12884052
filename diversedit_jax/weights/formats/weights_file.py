"""Weight files of other code bases as numpy arrays. Needs no torch, and runs nothing that a file holds.

    with open_weights("SiT-XL-2-256x256.pt") as weights:
        arrays = {name: weights[name] for name in weights.names("ema")}  # the optimizer's half stays unread

Four formats. The content of a file, not its name, says which it is:

safetensors    Length of the header, 8 bytes; header, JSON; numbers.
PyTorch        A zip archive without compression, since PyTorch 1.6: NAME/data.pkl, a pickle of the saved object; the
               storages NAME/data/KEY, plain numbers; NAME/byteorder, since 2.1.
PyTorch < 1.6  Five pickles in a row: a magic number, 1001, a dict about the machine, the saved object, the list of
               storage keys; then for every key the count of its elements, 8 bytes, and the elements. Little-endian.
flax           A state as msgpack, by `flax.serialization`; see `flax_msgpack`.
"""

import hashlib
import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from diversedit_jax.errors import WeightsError, check_machine
from diversedit_jax.reading import RegularFile, checksum, member_start, zip_members
from diversedit_jax.runtime.files import replacing
from diversedit_jax.weights.formats import NamedArrays, flax_msgpack, torch_pickle
from diversedit_jax.weights.formats.torch_pickle import DTYPES, Extent, Foreign, Tensor, contiguous, is_shape, show

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_PICKLE = b"\x8a\x0a" + _MAGIC.to_bytes(10, "little")
_PROTOCOL = 1001

_SAFETENSORS = {"BOOL": "bool", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_SAFETENSORS |= {f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("uint", "int") for bits in (8, 16, 32, 64)}
_SAFETENSORS |= {f"F{bits}": f"float{bits}" for bits in (16, 32, 64)}

# Views of one storage can name more bytes than the file has: tied weights twice as many, hostile files any number.
MAX_SHARING = 64
MAX_DEPTH = 100
MAX_WALK = 1 << 24


class WeightsFile(NamedArrays):
    """The tensors of an open weight file. A name is the path to the tensor, joined by dots.

    Arrays are copies: they outlive the file and may be written to. They are C-contiguous, in the machine's byte order.
    tree: the saved object: dicts, lists, tuples, numbers, strings, and `Tensor` (shape, dtype) in place of tensors.
    foreign: what is not read: the path to an object -> the name of what makes it.
    about: strings that a safetensors file holds besides.
    """

    def __init__(
        self,
        path: Path,
        file: RegularFile,
        tree: Any,
        extents: Mapping[str, Extent],
        byteorder: str,
        about: Mapping[str, str] | None = None,
    ):
        self.tree, self.about = tree, about or {}
        self._path, self._file, self._extents, self._byteorder = path, file, extents, byteorder
        self._whole: set[str] = set()  # storages whose checksum is verified
        self._tensors, self.foreign = _named_leaves(tree)
        if self.foreign and not self._tensors:
            dotted = show(next(iter(self.foreign.values())))
            raise WeightsError(f"refuses to load {dotted}: only tensors, containers and numbers are read")
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        for name, tensor in self._tensors.items():
            storage = tensor.storage
            if storage.key not in extents:
                raise WeightsError(f"{show(name)} lies in storage {show(storage.key)}, which the file lacks")
            if storage.nbytes > (given := extents[storage.key].nbytes):
                told = f"{given} bytes, {storage.nbytes} were announced"
                raise WeightsError(f"storage {show(storage.key)} of {show(name)} has {told}")
        if sum(tensor.nbytes for tensor in self._tensors.values()) > MAX_SHARING * file.size:
            raise WeightsError(f"its tensors overlap: they name more than {MAX_SHARING} times the bytes of the file")

    def __getitem__(self, name: str) -> np.ndarray:
        """One tensor. Only its part of the file is read."""
        if name not in self._tensors:
            raise WeightsError(f"{self._path}: no tensor {name!r}, it has {_listed(self._tensors)}")
        tensor = self._tensors[name]
        # As unsigned integers: extension types know neither strides over a buffer nor byte orders.
        words = np.empty(tensor.span, f"u{tensor.dtype.itemsize}")
        extent = self._extents[tensor.storage.key]
        self._file.seek(extent.start + tensor.offset * tensor.dtype.itemsize)
        if self._file.readinto(words) != words.nbytes:
            raise WeightsError(f"{self._path}: truncated while {show(name)} was read")
        if extent.crc and tensor.storage.key not in self._whole:
            all_of_it = words.nbytes == extent.nbytes
            if (zlib.crc32(words) if all_of_it else checksum(self._file, *extent[:2])) != extent.crc:
                raise WeightsError(f"{self._path}: {show(name)} is damaged: the checksum of its storage is wrong")
            self._whole.add(tensor.storage.key)
        if self._byteorder != sys.byteorder:
            words = words.byteswap()
        strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
        view = np.ndarray(tensor.shape, words.dtype, words, strides=strides if tensor.size else None)
        array = view if view.flags.c_contiguous else view.copy(order="C")
        return array != 0 if tensor.dtype == bool else array.view(tensor.dtype)

    def __exit__(self, *error: object) -> None:
        self._file.close()


def file_digest(path: str | Path) -> str:
    """sha256 of a file, in hex; WeightsError if it cannot be read."""
    try:
        with RegularFile(Path(path).expanduser()) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        check_machine(error)
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error


def open_weights(path: str | os.PathLike) -> WeightsFile:
    """Open a weight file of one of the formats above.

    Every tensor is checked against the file now, and none is read. Raises WeightsError, in one line.
    """
    path, file = Path(path), None
    try:
        file = RegularFile(path)
        return WeightsFile(path, file, *_contents(path, file))
    except (WeightsError, OSError, ValueError, MemoryError) as error:  # ValueError: a path with a null byte
        if file is not None:
            file.close()
        check_machine(error)
        raise WeightsError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _contents(path: Path, file: RegularFile) -> tuple:
    """Tree, extents of the storages, byte order of the numbers, and for safetensors the strings besides."""
    head = file.read(32)
    file.seek(0)
    if not head:
        raise WeightsError("is empty")
    if head.startswith(b"PK\x03\x04"):
        return _zip(file)
    if _MAGIC_PICKLE in head:
        return _legacy(file)
    if head[8:9] == b"{":
        return _safetensors(path, file)
    if flax_msgpack.starts(head):
        return *flax_msgpack.load(file), "little"
    wanted = "safetensors, PyTorch (zip or legacy) or flax's msgpack"
    raise WeightsError(f"is not a weight file: starts with {head[:8]!r}, wanted {wanted}")


def _safetensors(path: Path, file: RegularFile) -> tuple[Any, dict[str, Extent], str, dict[str, str]]:
    """The contents of a safetensors file, from its header."""
    try:
        with safetensors.safe_open(path, "numpy"):  # checks that the tensors fill the file exactly
            pass
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise WeightsError(f"is not a whole safetensors file: {show(str(error))}") from error
    tree, extents, about = {}, {}, header.pop("__metadata__", {})
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS:
            raise WeightsError(f"{show(name)} has dtype {entry['dtype']}, which is not read")
        dtype, shape = DTYPES[_SAFETENSORS[entry["dtype"]]], tuple(entry["shape"])
        if not is_shape(shape):
            raise WeightsError(f"{show(name)} has no shape that an array can have: {show(str(list(shape)))}")
        begin, end = entry["data_offsets"]
        tree[name] = contiguous(name, shape, dtype)
        extents[name] = Extent(8 + length + begin, end - begin)
    return tree, extents, "little", about


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice in its header")
    return found


def _zip(file: RegularFile) -> tuple[Any, dict[str, Extent], str]:
    """The contents of a PyTorch zip archive."""
    entries = _entries(file)
    pickles = [name for name in entries if re.fullmatch("[^/]+/data.pkl", name)]
    if len(pickles) != 1:
        raise WeightsError(f"is a zip archive without the one data.pkl of PyTorch, it has {_listed(entries)}")
    (root,) = (name.removesuffix("data.pkl") for name in pickles)
    if f"{root}constants.pkl" in entries:
        raise WeightsError("is a TorchScript archive, a program: only tensors that torch.save wrote are read")
    byteorder = "little"
    if f"{root}byteorder" in entries:
        start, nbytes, _ = entries[f"{root}byteorder"]
        file.seek(start)
        byteorder = file.read(min(nbytes, 8)).decode("latin-1")
    if byteorder not in ("little", "big"):
        raise WeightsError(f"has the byte order {byteorder!r}, wanted 'little' or 'big'")
    start, nbytes, crc = entries[f"{root}data.pkl"]
    if crc and nbytes <= torch_pickle.MAX_BYTES and checksum(file, start, nbytes) != crc:
        raise WeightsError("is damaged: the checksum of its pickle is wrong")
    file.seek(start)
    tree = torch_pickle.load(file)
    if file.tell() > start + nbytes:
        raise WeightsError("its pickle is longer than data.pkl")
    folder = f"{root}data/"
    return tree, {n.removeprefix(folder): e for n, e in entries.items() if n.startswith(folder)}, byteorder


def _entries(file: RegularFile) -> dict[str, Extent]:
    """Where the entries of a zip archive lie. PyTorch writes each name once, in folders, without compression."""
    entries = {}
    try:
        for name, info in zip_members(file).items():
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise ValueError(f"an entry {name}, which leads out of the archive")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
                raise ValueError(f"a compressed or encrypted entry {name}; PyTorch stores plain bytes")
            entries[name] = Extent(member_start(file, info), info.file_size, info.CRC)
            if entries[name].end > file.size:
                raise ValueError(f"entry {name} passes the end of the data")
    except ValueError as error:
        raise WeightsError(f"is no whole file of PyTorch: {show(str(error))}") from error
    return entries


def _legacy(file: RegularFile) -> tuple[Any, dict[str, Extent], str]:
    """The contents of a PyTorch file from before 1.6."""
    magic, protocol, _ = (torch_pickle.load(file) for _ in range(3))
    if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise WeightsError(f"is no legacy PyTorch file of protocol {_PROTOCOL}")
    storages: dict[str, torch_pickle.Storage] = {}
    tree = torch_pickle.load(file, storages=storages)
    keys = torch_pickle.load(file)
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise WeightsError("has no list of different storage keys behind its pickle")
    extents = {}
    for key in keys:
        if key not in storages:
            raise WeightsError(f"has a storage {show(key)} of no tensor")
        size, storage = int.from_bytes(file.read(8), "little"), storages[key]
        extents[key] = Extent(file.tell(), storage.nbytes)
        if size != storage.size:
            raise WeightsError(f"is truncated or damaged: storage {show(key)} of {storage.size} elements has {size}")
        if extents[key].end > file.size:
            raise WeightsError(f"is truncated: storage {show(key)} ends at byte {extents[key].end} of {file.size}")
        file.seek(extents[key].end)
    return tree, extents, "little"


def _named_leaves(tree: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a tree, and the names of its foreign objects, by the path that leads to them, joined by dots."""
    found, foreign, work = {}, {}, 0

    def walk(node: Any, path: str, depth: int) -> None:
        nonlocal work
        if type(node) is Tensor:
            if path in found:
                raise WeightsError(f"has two tensors named {show(path)}")
            found[path] = node
        elif type(node) is Foreign:
            foreign[path] = node.dotted
        elif isinstance(node, dict | list) or type(node) is tuple:
            if depth == MAX_DEPTH:
                raise WeightsError(f"is nested deeper than {MAX_DEPTH}")
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                below = f"{path}.{key}" if path else str(key)
                work += 1 + len(below)
                if work > MAX_WALK:
                    raise WeightsError("has too many tensors, or names too long")
                walk(value, below, depth + 1)

    walk(tree, "", 0)
    return found, foreign


def _listed(names: Mapping[str, Any]) -> str:
    """The first names, for an error message."""
    more = f" and {len(names) - 6} others" if len(names) > 6 else ""
    return ", ".join(map(show, list(names)[:6])) + more or "nothing"


def write_safetensors(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], about: Mapping[str, str] | None = None
) -> None:
    """Write arrays as .safetensors, whole or not at all. about: strings that the file also holds."""
    path = Path(path)
    for name, array in arrays.items():
        if array.dtype.newbyteorder("=") not in DTYPES.values():
            raise WeightsError(f"{path}: {name} has dtype {array.dtype}, which cannot be written")
    # safetensors writes memory as it lies, in whatever order the array is. Some readers ask for the format "pt".
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        with replacing(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # safetensors lets only the owner read its files, whatever the umask
            safetensors.numpy.save_file(arrays, partial, {"format": "pt", **(about or {})})
            partial.chmod(mode)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
