"""A state that `flax.serialization` wrote as msgpack: its tree, and where in the file its arrays lie.

An array is msgpack's extension 1: shape, name of the dtype and the numbers, all in msgpack. The numbers stay in the
file. Flax's own reader would load all of them, also those of the optimizer.
"""

import math
import struct
from typing import Any, BinaryIO

from diversedit_jax.errors import WeightsError
from diversedit_jax.weights.formats.torch_pickle import DTYPES, Extent, contiguous, is_shape, show

MAX_DEPTH = 100
MAX_ITEMS = 1 << 22  # of one file; a SiT-XL/2 with its optimizer has about 3 thousand

_NDARRAY, _SCALAR = 1, 3
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(enumerate("fdBHIQbhiq", 0xCA))  # tag -> code of `struct`
# Tag -> the kind of an object with a size, and the bytes of its size.
_SIZED = {0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4)}
_SIZED |= {0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4)}
_SIZED |= {0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}


def starts(head: bytes) -> bool:
    """Whether a file with this head may be a state of flax: a map whose first key is a string."""
    first = 1 if 0x81 <= head[0] <= 0x8F else {0xDE: 3, 0xDF: 5}.get(head[0], len(head))
    return first < len(head) and (0xA0 <= head[first] <= 0xBF or head[first] == 0xD9)


def load(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Extent]]:
    """The tree, with `Tensor` in place of arrays, and where each storage lies, by its key."""
    reader = _Reader(file)
    tree = reader.value(0)
    if file.read(1):
        raise WeightsError("is a damaged msgpack file: something follows its tree")
    if not isinstance(tree, dict):
        raise WeightsError("is a msgpack file without names")
    return tree, reader.extents


class _Reader:
    def __init__(self, file: BinaryIO):
        self.file, self.items, self.extents = file, 0, {}

    def bytes(self, n: int) -> bytes:
        found = self.file.read(n)
        if len(found) != n:
            raise WeightsError(f"is truncated or damaged: msgpack ends {n - len(found)} bytes too early")
        return found

    def tag(self) -> tuple[str, Any]:
        """The kind of the next object, and its size; a number or constant has its value there."""
        tag = self.bytes(1)[0]
        for last, kind, bits in ((0x7F, "value", 0x7F), (0x8F, "map", 0xF), (0x9F, "array", 0xF), (0xBF, "str", 0x1F)):
            if tag <= last:
                return kind, tag & bits
        if tag >= 0xE0:
            return "value", tag - 0x100
        if tag in _CONSTANTS:
            return "value", _CONSTANTS[tag]
        if tag in _NUMBERS:
            code = f">{_NUMBERS[tag]}"
            return "value", struct.unpack(code, self.bytes(struct.calcsize(code)))[0]
        if tag in _SIZED:
            kind, n = _SIZED[tag]
            return kind, int.from_bytes(self.bytes(n), "big")
        if 0xD4 <= tag <= 0xD8:
            return "ext", 1 << (tag - 0xD4)
        raise WeightsError(f"is a damaged msgpack file: tag {tag:#x}")

    def value(self, depth: int) -> Any:
        kind, size = self.tag()
        self.items += 1
        if depth > MAX_DEPTH or self.items > MAX_ITEMS:
            raise WeightsError("is nested too deeply, or has too many entries")
        if kind == "map":
            found = {}
            for _ in range(size):
                key = self.value(depth + 1)
                if not isinstance(key, str) or key in found:
                    raise WeightsError(f"has a key that is no name, or is there twice: {show(str(key))}")
                found[key] = self.value(depth + 1)
            if "__msgpack_chunked_array__" in found:
                raise WeightsError("has an array of more than a gigabyte, in chunks, which are not read")
            return found
        if kind == "array":
            return [self.value(depth + 1) for _ in range(size)]
        if kind == "str":
            return self.bytes(size).decode("utf-8", "replace")
        if kind == "bin":
            return self.bytes(size)
        return self.extension(size) if kind == "ext" else size

    def extension(self, size: int) -> Any:
        code = int.from_bytes(self.bytes(1), "big", signed=True)
        end = self.file.tell() + size
        if code not in (_NDARRAY, _SCALAR):
            self.bytes(size)
            return None  # a complex number, or an extension that flax does not write
        if self.tag() != ("array", 3):
            raise WeightsError("has an array that flax does not write")
        shape, name, (kind, nbytes) = self.value(0), self.value(0), self.tag()
        start, dtype = self.file.tell(), DTYPES.get(str(name))
        if kind != "bin" or start + nbytes != end:
            raise WeightsError("has an array that flax does not write")
        sizes = tuple(shape) if isinstance(shape, list) else None
        if dtype is None or not is_shape(sizes) or math.prod(sizes) * dtype.itemsize != nbytes:
            raise WeightsError(f"has an array of {nbytes} bytes that should be {show(f'{name} {shape}')}")
        self.file.seek(end - 1)
        self.bytes(1)  # raises if the file ends before it
        key = str(start)
        self.extents[key] = Extent(start, nbytes)
        return contiguous(key, sizes, dtype)
