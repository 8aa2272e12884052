"""A checkpoint folder that orbax wrote, as `flax.training.checkpoints` does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diversedit_jax.errors import WeightsError, check_machine
from diversedit_jax.reading import check_folder
from diversedit_jax.weights.formats import NamedArrays
from diversedit_jax.weights.formats.torch_pickle import is_shape

METADATA = "_METADATA"
MARKS = (METADATA, "checkpoint", "manifest.ocdbt")  # an orbax checkpoint of any age has one of them


class OrbaxFolder(NamedArrays):
    """The arrays of a checkpoint. A name is the path to the array, joined by dots.

    Arrays are read one at a time. A checkpoint without METADATA is read as a whole: only its arrays tell their shapes.
    tree: the saved object; its leaves have a shape.
    """

    def __init__(self, path: Path):
        import orbax.checkpoint as ocp  # here, because only such releases need it

        def tree() -> Any:
            check_folder(path)
            checkpointer = ocp.PyTreeCheckpointer()
            if not (path / METADATA).is_file():
                return checkpointer.restore(path)
            _check_index(path)
            return checkpointer.metadata(path).item_metadata.tree

        self._path, self._ocp = path, ocp
        self.tree = self._try("this checkpoint", tree)
        self._leaves = _flat(self.tree)
        self.shapes = self._try("the shapes", self._shapes)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: tuple(leaf.shape) for name, leaf in self._leaves.items()}
        if wrong := [name for name, shape in shapes.items() if not is_shape(shape)]:
            raise ValueError(f"{wrong[0]} has shape {shapes[wrong[0]]}")
        return shapes

    def _try(self, what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # orbax raises any class, and documents none
            check_machine(error)
            line = " ".join(str(error).split())[:300]
            raise WeightsError(f"{self._path}: orbax cannot read {what}: {type(error).__name__}: {line}") from error

    def __getitem__(self, name: str) -> np.ndarray:
        leaf = self._leaves[name]
        return leaf if isinstance(leaf, np.ndarray) else self._try(name, lambda: self._restored(name))

    def _restored(self, name: str) -> np.ndarray:
        # One array a call: if one of several fails, orbax reports the others to an event loop that is closed by then.
        ocp, leaf = self._ocp, self._leaves[name]
        item, on_host = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), ocp.RestoreArgs(restore_type=np.ndarray)
        for part in reversed(name.split(".")):
            item, on_host = {part: item}, {part: on_host}
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=on_host, partial_restore=True)
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        return _flat(checkpointer.restore(self._path, args=arguments))[name]


def find(path: Path) -> Path | None:
    """The orbax checkpoint at `path`: the folder itself, or the only `checkpoint_STEP` in it; None if there is none."""
    inside = [folder for folder in path.glob("checkpoint_*") if folder.is_dir()]
    for folder in [path, *(inside if len(inside) == 1 else [])]:
        if any((folder / mark).is_file() for mark in MARKS):
            return folder
    return None


def _flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(place, simple=True, separator="."): leaf for place, leaf in leaves}


def _check_index(path: Path) -> None:
    """Read the index of the checkpoint, to meet its errors here: orbax reads all entries at once, see `_restored`."""
    import tensorstore

    if (path / "manifest.ocdbt").is_file():
        tensorstore.KvStore.open({"driver": "ocdbt", "base": path.absolute().as_uri() + "/"}).result().list().result()
