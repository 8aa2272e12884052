"""Weights on disk: a file, or a folder as diffusers and transformers write it.

Such a folder holds config.json, and the weights in one file or in parts with an index. A file with the name that it has
in such a folder is read with the config.json beside it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.errors import WeightsError, check_machine
from diversedit_jax.reading import read_json
from diversedit_jax.weights.formats import NamedArrays
from diversedit_jax.weights.formats.weights_file import WeightsFile, file_digest, open_weights

CONFIG, PIPELINE = "config.json", "model_index.json"
NAMES = tuple(f"{stem}.{kind}" for stem in ("diffusion_pytorch_model", "model") for kind in ("safetensors", "bin"))
NAMES += ("pytorch_model.bin",)


class Parts(NamedArrays):
    """The arrays of several open weight files."""

    def __init__(self, files: list[WeightsFile]):
        self._holders = {name: file for file in files for name in file}
        self.tree = dict.fromkeys(self._holders)
        self.shapes = {name: file.shapes[name] for name, file in self._holders.items()}
        self.foreign = {path: dotted for file in files for path, dotted in file.foreign.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._holders[name][name]


def folder_of(path: Path, part: str) -> Path:
    """The folder `part` of a pipeline of diffusers; every other path stays as it is."""
    return path / part if (path / part / CONFIG).is_file() and not (path / CONFIG).is_file() else path


def files(path: Path) -> list[Path]:
    """The files that hold the weights at `path`. WeightsError for a folder without weights."""
    if not path.is_dir():
        return [path]
    for name in NAMES:
        if (path / name).is_file():
            return [path / name]
        if (index := path / f"{name}.index.json").is_file():
            parts = _read(index).get("weight_map")
            if not isinstance(parts, dict) or not all(
                isinstance(part, str) and len(part) < 256 for part in parts.values()
            ):
                raise WeightsError(f"{index}: wanted 'weight_map', the file of each array")
            return [path / Path(part).name for part in dict.fromkeys(parts.values())]
    raise WeightsError(f"{path}: a folder without weights ({described(path)}): wanted {', '.join(NAMES)}, or an index")


@contextmanager
def opened(path: Path) -> Iterator[NamedArrays]:
    """The arrays at `path`, from one file or several."""
    with ExitStack() as stack:
        found = [stack.enter_context(open_weights(file)) for file in files(path)]
        yield found[0] if len(found) == 1 else Parts(found)


def config(path: Path) -> dict[str, Any]:
    """The config.json of the weights at `path`; {} if there is none."""
    if path.is_dir():
        folder = path
    elif path.name in NAMES:
        folder = path.parent
    else:
        return {}
    return _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def digest(path: Path) -> str:
    """sha256 of the weights at `path`, in hex: of the file, or of the digests of its parts."""
    found = [file_digest(file) for file in files(path)]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def described(path: Path) -> str:
    """What a folder is, in words."""
    if (path / PIPELINE).is_file():
        inside = sorted(entry.name for entry in path.iterdir() if (entry / CONFIG).is_file())
        return f"a pipeline of diffusers, give one of its folders: {', '.join(inside)}"
    if (path / CONFIG).is_file():
        about = _read(path / CONFIG)
        if "_class_name" in about:
            return f"{about['_class_name']} of diffusers"
        if "model_type" in about:
            return f"{about['model_type']} of transformers"
        return "an unknown config.json"
    inside = sorted(entry.name for entry in path.iterdir())
    return f"it holds {', '.join(inside[:4])}{', ...' * (len(inside) > 4)}" if inside else "it is empty"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        check_machine(error)
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: cannot be read: wanted a JSON object")
    return content
