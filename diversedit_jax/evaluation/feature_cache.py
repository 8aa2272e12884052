"""Features of images in files while an evaluation runs, so that it goes on after it was killed.

FOLDER/plan.json says what is evaluated. FOLDER/00000512.npz holds the features of the images from number 512 on. Every
file appears whole or not at all. A damaged one is made again.
"""

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.errors import CheckpointError, DataError, check_machine
from diversedit_jax.evaluation.extractors import Features
from diversedit_jax.evaluation.scoring import ExtractedFeatures
from diversedit_jax.reading import Npz, read_json
from diversedit_jax.runtime.files import check_same, replacing, write_json, write_npz

PLAN = "plan.json"
NAMES = "names"  # array with the names of the others: if the index of an .npz is damaged, one may be missing


def claim(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Make the folder. Returns whether the same plan had begun there; ConfigError for another plan."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        begun = read_json(folder / PLAN)
        if not isinstance(begun, dict):
            raise ValueError("wanted a JSON object")
    except FileNotFoundError:
        write_json(folder / PLAN, plan)
        return False
    except (OSError, ValueError) as error:
        check_machine(error)
        raise DataError(f"{folder / PLAN} cannot be read: {error}") from error
    check_same(f"{folder} holds an unfinished evaluation", begun, plan, "finish it, remove it, or choose another --out")
    return True


def place(folder: Path, first: int) -> Path:
    """The file of the images from number `first` on."""
    return folder / f"{first:08d}.npz"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn OSError into CheckpointError, which names `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}; the same command goes on later") from error


def write(
    folder: Path, first: int, features: ExtractedFeatures, images: np.ndarray, shown: Mapping[int, np.ndarray]
) -> None:
    """Keep the features of a part, its `images` (or none) and the images that the grid shows, by number."""
    arrays = {
        f"{name}/{kind}": x for name, part in features.items() for kind, x in part._asdict().items() if x is not None
    }
    arrays |= {"images": images} if len(images) else {}
    arrays |= {f"shown/{number}": image for number, image in shown.items()}
    arrays[NAMES] = np.array(sorted(arrays))
    with writing(place(folder, first)):
        write_npz(place(folder, first), arrays)


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Npz]:
    """The arrays of a part, each verified when it is read. ValueError if some are missing."""
    with Npz(path) as file:
        if NAMES not in file or sorted(file) != sorted([NAMES, *map(str, np.ravel(file[NAMES]))]):
            raise ValueError("arrays are missing")
        yield file


def read(folder: Path, first: int) -> dict[str, np.ndarray] | None:
    """The arrays of a part. If it is missing or damaged: None, and its file is removed."""
    path = place(folder, first)
    try:
        with _part(path) as file:
            return {name: file[name] for name in file if name != NAMES}
    except (OSError, ValueError, MemoryError) as error:
        check_machine(error)
    with writing(path):
        path.unlink(missing_ok=True)
    return None


def _below(folder: Path, first: int, prefix: str) -> dict[str, np.ndarray]:
    """The arrays of a part whose names begin with a prefix, without it. DataError if the part is damaged by now."""
    path = place(folder, first)
    try:
        with _part(path) as file:
            return {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}
    except (OSError, ValueError, MemoryError) as error:
        check_machine(error)
        raise DataError(f"{path} was damaged or removed ({error}): run the same command again") from error


def features(folder: Path, firsts: list[int], name: str) -> Iterator[Features]:
    """The features of one network, part by part."""
    return (Features(**_below(folder, first, f"{name}/")) for first in firsts)


def shown(folder: Path, firsts: list[int]) -> dict[int, np.ndarray]:
    """The images that the grid shows, by number."""
    return {int(number): image for first in firsts for number, image in _below(folder, first, "shown/").items()}


def join_images(folder: Path, firsts: list[int], num: int, labels: np.ndarray | None, out: Path) -> None:
    """Write the kept images of all parts as an .npz that the script of ADM reads: `arr_0`, and `labels`."""
    size = _below(folder, firsts[0], "images")[""].shape[1:]
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *size)}
    with writing(out), replacing(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for first in firsts:
                member.write(np.ascontiguousarray(_below(folder, first, "images")[""][: num - first]).tobytes())
        if labels is not None:
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, np.int32), allow_pickle=False)


def remove(folder: Path, firsts: list[int]) -> None:
    """Remove the parts and the plan of a finished evaluation, and the folder if nothing else is in it."""
    for path in [*(place(folder, first) for first in firsts), folder / PLAN]:
        path.unlink(missing_ok=True)
        for torn in folder.glob(f".{path.name}.*"):  # left by a killed process, see `runtime.files.replacing`
            torn.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
