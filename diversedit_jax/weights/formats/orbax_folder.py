"""A checkpoint that orbax wrote as a folder, as `flax.training.checkpoints` does, read as weight files are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diversedit_jax.errors import WeightsError

METADATA = "_METADATA"
MARKS = (METADATA, "checkpoint", "manifest.ocdbt")  # an orbax checkpoint of any age has one of them


class OrbaxFolder(Mapping):
    """The arrays of a checkpoint by the names that lead to them, joined by dots.

    Arrays are read one at a time; all at once where the checkpoint is so old that only they tell their shapes.
    tree: the saved object; its leaves have a shape.
    """

    def __init__(self, path: Path):
        import orbax.checkpoint as ocp  # of a higher floor, and for such releases only

        def tree() -> Any:
            checkpointer = ocp.PyTreeCheckpointer()
            if not (path / METADATA).is_file():
                return checkpointer.restore(path)
            _check_index(path)
            return checkpointer.metadata(path).item_metadata.tree

        self._path, self._ocp = path, ocp
        self.tree = self._try("this checkpoint", tree)
        self._leaves = _flat(self.tree)

    def _try(self, what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # orbax says of none that it is the one
            line = " ".join(str(error).split())[:300]
            raise WeightsError(f"{self._path}: orbax cannot read {what}: {type(error).__name__}: {line}") from error

    def names(self, prefix: str = "") -> list[str]:
        """Names of the arrays at and below a path of the tree."""
        return [name for name in self._leaves if not prefix or name == prefix or name.startswith(f"{prefix}.")]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array, which is not read."""
        return tuple(self._leaves[name].shape)

    def read(self, name: str) -> np.ndarray:
        """One array."""
        leaf = self._leaves[name]
        return leaf if isinstance(leaf, np.ndarray) else self._try(name, lambda: self._restored(name))

    def _restored(self, name: str) -> np.ndarray:
        # Alone: where orbax fails at one of many arrays, the others report to an event loop that is closed by then.
        ocp, leaf = self._ocp, self._leaves[name]
        item, on_host = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), ocp.RestoreArgs(restore_type=np.ndarray)
        for part in reversed(name.split(".")):
            item, on_host = {part: item}, {part: on_host}
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=on_host, partial_restore=True)
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        return _flat(checkpointer.restore(self._path, args=arguments))[name]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def __iter__(self):
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def __enter__(self) -> "OrbaxFolder":
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing stays open between two arrays."""


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
    """Raise what reading the checkpoint's own index raises: orbax reads all arrays' entries at once (see above)."""
    import tensorstore  # which orbax stores with

    if (path / "manifest.ocdbt").is_file():
        tensorstore.KvStore.open({"driver": "ocdbt", "base": path.absolute().as_uri() + "/"}).result().list().result()
