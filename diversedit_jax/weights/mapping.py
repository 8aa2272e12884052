"""Between the arrays of a weight file and a tree of parameters: names and shapes first, then one array at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.weights.dit_names import Entry
from diversedit_jax.weights.formats.orbax_folder import OrbaxFolder
from diversedit_jax.weights.formats.weights_file import WeightsFile


class Arrays(Mapping):
    """The arrays below one entry of a weight file, by the rest of their names, read when they are asked for.

    rename: from the rest of a name to the one that is used here.
    """

    def __init__(self, file: WeightsFile | OrbaxFolder, prefix: str = "", rename: Callable[[str], str] = str):
        names = file.names(prefix)
        rest = [name.removeprefix(f"{prefix}.") if prefix else name for name in names]
        if all(name.startswith("module.") for name in rest):  # as torch's data-parallel wrappers save
            rest = [name.removeprefix("module.") for name in rest]
        self._file, self._names = file, dict(zip(map(rename, rest), names, strict=True))
        self.shapes = {short: file.shape(name) for short, name in self._names.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file.read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check(
    what: str,
    entries: Sequence[Entry],
    shapes: Mapping[str, tuple[int, ...]],
    target: Params,
    aside: tuple[str, ...] = (),
) -> None:
    """Raise ConfigError, in the name of `what`, for the first array that is missing, left over or misshapen.

    target: the shapes of our parameters. aside: beginnings of names that the file may hold beside them.
    """
    wanted = {}
    for entry in entries:
        ours = np.broadcast_to(np.float32(0), _shape(target, entry))
        wanted[entry.name] = entry.turn.theirs(ours).shape
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted and not name.startswith(aside)]
    wrong = [name for name in wanted if name in shapes and tuple(shapes[name]) != wanted[name]]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{what}: the array {missing[0]} {list(wanted[missing[0]])} is missing{more}")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ConfigError(f"{what}: the array {extra[0]} {list(shapes[extra[0]])} is not known{more}")
    if wrong:
        name = wrong[0]
        raise ConfigError(f"{what}: {name} has shape {list(shapes[name])}, wanted {list(wanted[name])}")


def fill(what: str, entries: Sequence[Entry], arrays: Mapping[str, np.ndarray], params: Params) -> Params:
    """`params`, a tree of empty arrays on the host, with every entry read into its place and its dtype.

    Raises ConfigError where two names of one array hold different values.
    """
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
    """The way back: our parameters under the names of the entries, C-contiguous float32."""
    return {
        entry.name: np.array(entry.turn.theirs(np.asarray(place(params, entry), np.float32)), order="C")
        for entry in entries
    }


def place(params: Params, entry: Entry) -> np.ndarray:
    """A view of where an entry's array goes."""
    for name in entry.place:
        params = params[name]
    array = params if entry.layer is None else params[entry.layer]
    if entry.part is None:
        return array
    return array[entry.part] if entry.place[-1] == "bias" else array[:, entry.part]


def _shape(target: Params, entry: Entry) -> tuple[int, ...]:
    for name in entry.place:
        target = target[name]
    shape = target.shape if entry.layer is None else target.shape[1:]
    if entry.part is None:
        return shape
    return shape[1:] if entry.place[-1] == "bias" else (shape[0], *shape[2:])
