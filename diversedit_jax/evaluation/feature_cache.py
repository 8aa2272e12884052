"""Features of images in files while an evaluation runs, so that one that was killed goes on where it was.

FOLDER/plan.json says what is evaluated, FOLDER/00000512.npz holds the features of the images from number 512 on. Every
file appears whole or not at all; one that cannot be read back is made again.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.errors import CheckpointError, DataError
from diversedit_jax.evaluation.extractors import Features
from diversedit_jax.evaluation.scoring import Found
from diversedit_jax.runtime.files import check_same, replacing, write_json, write_npz

PLAN = "plan.json"
NAMES = "names"  # of the other arrays of a part: a damaged index of an .npz may leave one out


def claim(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Make the folder, or take one that the same plan has begun; returns whether it had begun.

    ConfigError for one of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        begun = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_json(folder / PLAN, plan)
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / PLAN} cannot be read: {error}") from error
    check_same(f"{folder} holds an unfinished evaluation", begun, plan, "finish it, remove it, or choose another --out")
    return True


def place(folder: Path, first: int) -> Path:
    """The file of the images from number `first` on."""
    return folder / f"{first:08d}.npz"


def write(folder: Path, first: int, found: Found, images: np.ndarray, shown: Mapping[int, np.ndarray]) -> None:
    """Keep the features of a part, `images` (none of them, or all) and those that a grid shows, by number.

    Raises CheckpointError where the disk does not take them.
    """
    arrays = {
        f"{name}/{kind}": x for name, part in found.items() for kind, x in part._asdict().items() if x is not None
    }
    arrays |= {"images": images} if len(images) else {}
    arrays |= {f"shown/{number}": image for number, image in shown.items()}
    arrays[NAMES] = np.array(sorted(arrays))
    path = place(folder, first)
    try:
        write_npz(path, arrays)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; the same command goes on later") from error


def read(folder: Path, first: int) -> dict[str, np.ndarray] | None:
    """The arrays of a part; None, and no file, where it is missing or damaged."""
    path = place(folder, first)
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        if sorted(found) == sorted([NAMES, *found.pop(NAMES, ())]):
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile):  # RuntimeError: "is encrypted", by a bit
        pass
    path.unlink(missing_ok=True)
    return None


def features(folder: Path, firsts: list[int], name: str) -> Iterator[Features]:
    """The features of one network, part by part."""
    for first in firsts:
        with np.load(place(folder, first), allow_pickle=False) as file:
            kinds = {kind: file[f"{name}/{kind}"] for kind in Features._fields if f"{name}/{kind}" in file.files}
        yield Features(**kinds)


def shown(folder: Path, firsts: list[int]) -> dict[int, np.ndarray]:
    """The images that a grid shows, by number."""
    found = {}
    for first in firsts:
        with np.load(place(folder, first), allow_pickle=False) as file:
            names = [name for name in file.files if name.startswith("shown/")]
            found |= {int(name.partition("/")[2]): file[name] for name in names}
    return found


def join_images(folder: Path, firsts: list[int], num: int, labels: np.ndarray | None, out: Path) -> None:
    """Write the kept images of all parts as an .npz that the script of ADM reads: `arr_0`, and `labels`.

    Raises CheckpointError where the disk does not take it.
    """
    try:
        with replacing(out) as partial:
            _write_joined(folder, firsts, num, labels, partial)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror}; the same command goes on later") from error


def _write_joined(folder: Path, firsts: list[int], num: int, labels: np.ndarray | None, out: Path) -> None:
    with np.load(place(folder, firsts[0]), allow_pickle=False) as file:
        shape = (num, *file["images"].shape[1:])
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for first in firsts:
                with np.load(place(folder, first), allow_pickle=False) as file:
                    member.write(np.ascontiguousarray(file["images"][: num - first]).tobytes())
        if labels is not None:
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int32), allow_pickle=False)


def remove(folder: Path, firsts: list[int]) -> None:
    """Remove a finished evaluation's parts and plan, and the folder where nothing else is in it.

    With each goes what a process that was killed while it wrote it has left, see `runtime.files.replacing`.
    """
    for path in [*(place(folder, first) for first in firsts), folder / PLAN]:
        path.unlink(missing_ok=True)
        for torn in folder.glob(f".{path.name}.*"):
            torn.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
