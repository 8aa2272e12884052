"""A database of LMDB, read as a file. Its own library maps the file, and a damaged one ends the process by a signal.

page        64-bit, little-endian; all numbers of pages count from the begin of the file
  0, 8      its own number, 8 bytes; unused, 2 bytes
  10        flags, 2 bytes: BRANCH, LEAF or OVERFLOW
  12        of a branch or leaf: end of the list of its nodes, 2 bytes; of an overflow: how many pages it fills
  16        of a branch or leaf: the places of its nodes in the order of their keys, 2 bytes each
node        low and high half of a size, flags, size of the key, 2 bytes each; then the key, and in a leaf the value
            a branch's size and flags are the number of the page below; a value with BIG is the number of the first
            of its overflow pages
meta page   0 and 1: magic, version, 4 bytes each; address, size of the map; the free list and the tree, 48 bytes
            each; last page; number of the transaction. The later transaction counts.
"""

import struct
from bisect import bisect
from dataclasses import dataclass
from pathlib import Path

from diversedit_jax.reading import RegularFile

BRANCH, LEAF, OVERFLOW = 1, 2, 4
BIG = 1  # flag of a node
MAGIC, VERSION = 0xBEEFC0DE, 1
HEADER = 16  # bytes of a page before its content
TREE = struct.Struct("<IHHQQQQQ")  # page size (of the free list), flags, depth, branches, leaves, overflows, n, root
NONE = 2**64 - 1  # the root of an empty tree
MAX_DEPTH = 32
PAGE_SIZES = tuple(2**power for power in range(8, 17))


@dataclass(frozen=True)
class Database:
    """The entries by key, for many threads and processes: every read opens the file. Damage is a ValueError."""

    path: Path
    page_size: int
    last: int
    root: int

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if it is not there."""
        if self.root == NONE:
            return None
        with RegularFile(self.path) as file:
            number = self.root
            for _ in range(MAX_DEPTH):
                page = self._page(file, number)
                kind, end = struct.unpack_from("<HH", page, 10)
                places = _places(page, end)
                if kind not in (BRANCH, LEAF) or not places:
                    raise ValueError(f"page {number} is neither a branch nor a leaf")
                # In a branch, the key of the first node stands for all that are smaller.
                place = bisect(places, key, int(kind == BRANCH), key=lambda place, page=page: _node(page, place)[2]) - 1
                node = size, flags, found, _ = _node(page, places[place])
                if kind == LEAF:
                    return self._value(file, page, node) if found == key else None
                number = size | flags << 32
        raise ValueError(f"it is deeper than {MAX_DEPTH} pages")

    def _page(self, file: RegularFile, number: int, count: int = 1) -> bytes:
        if number + count - 1 > self.last:
            raise ValueError(f"page {number} is beyond the last one, {self.last}")
        file.seek(number * self.page_size)
        page = file.read(count * self.page_size)
        if len(page) != count * self.page_size or struct.unpack_from("<Q", page)[0] != number:
            raise ValueError(f"page {number} is truncated or damaged")
        return page

    def _value(self, file: RegularFile, page: bytes, node: tuple[int, int, bytes, int]) -> bytes:
        size, flags, _, start = node
        if flags == 0:
            if start + size > len(page):
                raise ValueError("a value passes the end of its page")
            return page[start : start + size]
        if flags != BIG or start + 8 > len(page):
            raise ValueError(f"a value of kind {flags}")
        (number,) = struct.unpack_from("<Q", page, start)
        value = self._page(file, number, -(-(HEADER + size) // self.page_size))
        if struct.unpack_from("<H", value, 10)[0] != OVERFLOW:
            raise ValueError(f"page {number} holds no value")
        return value[HEADER : HEADER + size]


def _places(page: bytes, end: int) -> tuple[int, ...]:
    if not HEADER <= end <= len(page) or end % 2:
        raise ValueError("a page with a damaged list of nodes")
    return struct.unpack_from(f"<{(end - HEADER) // 2}H", page, HEADER)


def _node(page: bytes, place: int) -> tuple[int, int, bytes, int]:
    """Size, flags, key, and where the value begins."""
    if place + 8 > len(page):
        raise ValueError("a node passes the end of its page")
    low, high, flags, length = struct.unpack_from("<HHHH", page, place)
    start = place + 8 + length
    if start > len(page):
        raise ValueError("a key passes the end of its page")
    return low | high << 16, flags, page[place + 8 : start], start


def open_database(path: Path) -> Database:
    """The database in a file, or in data.mdb of a folder. OSError if there is none, ValueError if it is damaged."""
    path = path / "data.mdb" if path.is_dir() else path
    with RegularFile(path) as file:
        first = _meta(file, 0)
        _, page_size, last, root = max(first, _meta(file, first[1]))
        if file.size < (last + 1) * page_size:
            raise ValueError(f"it is truncated: {file.size} bytes, wanted {last + 1} pages of {page_size}")
    return Database(path, page_size, last, root)


def _meta(file: RegularFile, start: int) -> tuple[int, int, int, int]:
    """Number of the transaction, page size, last page and root."""
    file.seek(start)
    page = file.read(HEADER + 24 + 2 * TREE.size + 16)
    if len(page) < HEADER + 24 + 2 * TREE.size + 16 or struct.unpack_from("<II", page, HEADER) != (MAGIC, VERSION):
        raise ValueError("it is no database of LMDB, or of another version or byte order")
    page_size, *_ = TREE.unpack_from(page, HEADER + 24)
    _, flags, _, _, _, _, _, root = TREE.unpack_from(page, HEADER + 24 + TREE.size)
    last, transaction = struct.unpack_from("<QQ", page, HEADER + 24 + 2 * TREE.size)
    if page_size not in PAGE_SIZES or flags:
        raise ValueError(f"its tree is not of plain keys in pages of 256 to 65536 bytes: {page_size}, {flags:#x}")
    return transaction, page_size, last, root
