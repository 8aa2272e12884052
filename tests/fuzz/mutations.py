"""Damage to files, the same for the same seed: in their bytes, their JSON, their archives, their kind."""

import io
import json
import os
import re
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EXTREMES = (0, 1, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**62, 2**63 - 1, 2**64 - 1)
# Values of other kinds, and a module that does not exist: importing it would run what a file says.
ODD = [None, True, -1, 0, 1.5, 2**31, 200_000_000, 2**62, 10**400, float("inf"), float("nan"), ""]
ODD += ["planted.module.Name"]
ODD += ["../../../etc/passwd", "\ud800", "\0", [], [[]], {}, {"a": 1}, [2**62] * 3, "x" * 5000]
OTHERS = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(planted) print\nshowpage\n%%EOF\n",
    "deep": b"[" * 100_000,
    "zip": b"PK\3\4" + bytes(60),
    "pickle": b"\x80\x02cposix\nsystem\nX\x07\0\0\0plantedq\0\x85R.",
    "npy": b"\x93NUMPY\1\0\x76\0{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976,), }"
    + b" " * 46,
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x2e\0\0\0\x2e\0\x08\x06\0\0\0" + bytes(40),
}

Random = np.random.Generator


def place(rng: Random, size: int) -> int:
    """A place in a file, more often near its ends, where headers and directories are."""
    near = int(rng.integers(min(size, 256)))
    return [int(rng.integers(size)), near, size - 1 - near][rng.integers(3)]


def flipped(content: bytes, rng: Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 30])):
        damaged[place(rng, len(content))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def cut(content: bytes, rng: Random) -> bytes:
    return content[: place(rng, len(content))]


def spliced(content: bytes, rng: Random) -> bytes:
    """A part is written over another place, inserted there, or taken out."""
    start, to = place(rng, len(content)), place(rng, len(content))
    part = content[start : start + int(rng.integers(1, 64))]
    return [
        content[:to] + part + content[to + len(part) :],
        content[:to] + part + content[to:],
        content[:start] + content[start + len(part) :],
        content + part,
    ][rng.integers(4)]


def extreme(content: bytes, rng: Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes becomes an extreme one; or one in digits does."""
    value = int(rng.choice(np.array(EXTREMES, object)))
    if rng.integers(3) == 0 and (runs := list(re.finditer(rb"\d+", content[:4000]))):
        run = runs[rng.integers(len(runs))]
        number = str(value).encode() if rng.integers(2) else b"-1"
        if rng.integers(2):  # keeps the length, as headers of .npy and tar need it
            number = number[: len(run[0])].rjust(len(run[0]), b"0")
        return content[: run.start()] + number + content[run.end() :]
    size, order = int(rng.choice([1, 2, 4, 8])), ["little", "big"][rng.integers(2)]
    start = place(rng, len(content)) & -(size if rng.integers(2) else 1)
    return content[:start] + (value % 256**size).to_bytes(size, order) + content[start + size :]


def other_content(content: bytes, rng: Random) -> bytes:
    name = list(OTHERS)[rng.integers(len(OTHERS))]
    return OTHERS[name] if rng.integers(4) else b""


RAW = (flipped, flipped, cut, spliced, extreme, extreme)


def raw(content: bytes, rng: Random) -> bytes:
    return RAW[rng.integers(len(RAW))](content, rng) if content else b"x"


def odd_json(content: bytes, rng: Random) -> bytes:
    """A value in JSON becomes one of another kind, is there twice, or is missing."""
    tree = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    if not isinstance(tree, dict | list):
        return json.dumps(ODD[rng.integers(len(ODD))]).encode()
    walk(tree)
    if not places or rng.integers(12) == 0:
        return json.dumps(ODD[rng.integers(len(ODD))]).encode()
    node, key = places[rng.integers(len(places))]
    if rng.integers(4) == 0:
        del node[key]
    elif rng.integers(6) == 0:
        node[key] = [node[key]] * 2
    else:
        node[key] = ODD[rng.integers(len(ODD))]
    return json.dumps(tree).encode()


def is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def rezipped(content: bytes, rng: Random) -> bytes:
    """A member is damaged, and the archive written anew: its checksums are right. Or a member is missing, or twice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    which = int(rng.integers(len(members)))
    info, inner = members[which]
    kind = rng.integers(8)
    if kind == 0:
        del members[which]
    elif kind == 1:
        members.append((info, raw(inner, rng)))
    elif kind == 2:
        members[which] = (info, other_content(inner, rng))
    elif kind == 3:
        members[which] = (info, bytes(2**25))  # a bomb, once it is compressed
    else:
        members[which] = (info, (odd_json if is_json(inner) else raw)(inner, rng))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one, body in members:
            archive.writestr(one.filename, body, zipfile.ZIP_DEFLATED if len(body) > 2**20 else one.compress_type)
    return file.getvalue()


def retarred(content: bytes, rng: Random) -> bytes:
    """A field of a header is damaged, and the header's checksum is right; or a member is damaged."""
    damaged = bytearray(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    member = members[rng.integers(len(members))]
    if rng.integers(4) == 0:
        start, size = member.offset_data, max(member.size, 1)
        damaged[start + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
        return bytes(damaged)
    start = member.offset
    field, size = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)][rng.integers(7)]
    if field == 156:
        damaged[start + 156] = int(rng.choice(list(b"0123456789SLKxgDNV")))
    elif rng.integers(2):
        value = [2**62, 2**33, 0, -512, -1024, 8**11 - 1][rng.integers(6)]
        number = (128 << 8 * (size - 1) | value) if value >= 0 else (256**size + value)
        damaged[start + field : start + field + size] = number.to_bytes(size, "big")
    else:
        damaged[start + field + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    header = damaged[start : start + 512]
    total = sum(header[:148]) + 256 + sum(header[156:])
    damaged[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(damaged)


def of_content(content: bytes, rng: Random) -> bytes:
    """Damage that fits the kind of the file half of the time, and in its bytes otherwise."""
    if rng.integers(2):
        if content.startswith(b"PK\3\4"):
            return rezipped(content, rng)
        if len(content) > 512 and content[257:262] == b"ustar":
            return retarred(content, rng)
        if is_json(content):
            return odd_json(content, rng)
    return other_content(content, rng) if rng.integers(12) == 0 else raw(content, rng)


def of_kind(path: Path, rng: Random) -> None:
    """What lies at the path is no longer a file that can be read."""
    path.unlink()
    kind = rng.integers(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path)
    elif kind == 3:
        path.touch()


def damage(folder: Path, seed: list[int]) -> tuple[str, Callable[[], None], bool]:
    """Damage a file below a folder. Returns what was done, how to undo it, and whether only bytes were changed."""
    rng = np.random.default_rng(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[rng.integers(len(files))]
    content = path.read_bytes()

    def undo() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)

    if rng.integers(16) == 0:
        of_kind(path, rng)
        return f"{path.name}: another kind", undo, False
    plain = bool(rng.integers(2)) and bool(content)
    path.write_bytes(raw(content, rng) if plain else of_content(content, rng))
    return path.name, undo, plain
