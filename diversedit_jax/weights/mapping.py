"""Move arrays between a weight file and our parameters: check names and shapes first, then one array at a time."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.weights.dit_names import Entry
from diversedit_jax.weights.formats import NamedArrays

Shapes = Mapping[str, tuple[int, ...]]


# Parts of names that torch adds where it wraps a module: data-parallel, compiled, sharded, with activation checkpoints.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Arrays(NamedArrays):
    """The arrays below one entry of a weight file, by the rest of their names, without WRAPPERS.

    rename: changes the rest of a name.
    """

    def __init__(self, file: NamedArrays, prefix: str = "", rename: Callable[[str], str] = str):
        names = file.names(prefix)
        rest = (name.removeprefix(f"{prefix}.") if prefix else name for name in names)
        bare = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in rest]
        self._file, self._names = file, dict(zip(map(rename, bare), names, strict=True))
        self.shapes = {short: file.shapes[name] for short, name in self._names.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file[self._names[name]]


def axes(what: str, shapes: Shapes, name: str, count: int) -> tuple[int, ...]:
    """The shape of an array with `count` axes; ConfigError, in the name of `what`, if it is missing or has others."""
    if name not in shapes:
        raise ConfigError(f"{what}: the array {name} is missing")
    if len(shapes[name]) != count:
        raise ConfigError(f"{what}: the array {name} has shape {list(shapes[name])}, wanted {count} axes")
    return shapes[name]


def few(names: Mapping[str, object]) -> str:
    """The first names, for an error message."""
    return f"{', '.join(list(names)[:3]) or 'nothing'}, ..."


def check(what: str, entries: Sequence[Entry], shapes: Shapes, target: Params, ignored: tuple[str, ...] = ()) -> None:
    """Raise ConfigError, in the name of `what`, for the first array that is missing, left over or misshapen.

    target: shapes of our parameters. ignored: prefixes of names that the file may hold besides.
    """
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), target)
    wanted = {entry.name: entry.turn.theirs(place(zeros, entry)).shape for entry in entries}
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted and not name.startswith(ignored)]
    for names, known, problem in [(missing, wanted, "missing"), (extra, shapes, "not known")]:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"{what}: the array {names[0]} {list(known[names[0]])} is {problem}{more}")
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            raise ConfigError(f"{what}: {name} has shape {list(shapes[name])}, wanted {list(shape)}")


def fill(what: str, entries: Sequence[Entry], arrays: Mapping[str, np.ndarray], target: Params) -> Params:
    """Our parameters on the host, with the shapes and dtypes of `target`. Every entry is read once.

    Raises ConfigError where two names of one array hold different values.
    """
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), target)
    filled: set[tuple] = set()
    for entry in entries:
        here = place(params, entry)
        ours = entry.turn.ours(np.asarray(arrays[entry.name], np.float32)).astype(here.dtype)
        key = (entry.place, entry.layer, entry.part)
        if key in filled and not np.array_equal(here, ours):
            raise ConfigError(f"{what}: {entry.name} differs from its copies in other blocks: the model has one")
        here[...] = ours
        filled.add(key)
    return params


def written(entries: Sequence[Entry], params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the names of the entries, C-contiguous float32: the inverse of `fill`."""
    return {
        entry.name: np.array(entry.turn.theirs(np.asarray(place(params, entry), np.float32)), order="C")
        for entry in entries
    }


def place(params: Params, entry: Entry) -> np.ndarray:
    """The view of our parameters that an entry stands for."""
    for name in entry.place:
        params = params[name]
    array = params if entry.layer is None else params[entry.layer]
    if entry.part is None:
        return array
    return array[entry.part] if entry.place[-1] == "bias" else array[:, entry.part]
