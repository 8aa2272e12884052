"""A run as a folder to publish: model.safetensors with its weights, and its config.json.

The arrays have the names and dtypes of our parameters, so that they come back to the bit. What a checkpoint holds
besides (the step, which weights, the space of the data) is one line of JSON in model.safetensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from diversedit_jax import sharding
from diversedit_jax.api import Params
from diversedit_jax.config import FILE, MODULES
from diversedit_jax.errors import CheckpointError, ConfigError, UnfitCheckpointError, WeightsError
from diversedit_jax.reading import parse_json, read_json
from diversedit_jax.runs import build
from diversedit_jax.runtime.files import write_json
from diversedit_jax.training.checkpoint import difference, leaves_of
from diversedit_jax.weights.formats.weights_file import open_weights, write_safetensors

WEIGHTS = "model.safetensors"
ABOUT = "diversedit_jax"  # the key of our JSON in WEIGHTS


def write(folder: Path, workdir: Path, params: Params, entry: str, step: int, space: Mapping[str, Any]) -> None:
    """Write the folder of a run.

    workdir: of the run, whose config.json it takes. params: on the host.
    entry: of a checkpoint, `ema` or `params`. space: as `build.to_json` has it.
    """
    config = read_json(workdir / FILE)
    config.pop(MODULES, None)  # folders of this machine
    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps({"entry": entry, "step": step, "space": space})
    write_safetensors(folder / WEIGHTS, sharding.by_name(params), {ABOUT: about})
    write_json(folder / FILE, config, sort_keys=True)


def holds(folder: Path) -> bool:
    """Whether a folder is one that `write` has written, and not the workdir of a run."""
    return (folder / WEIGHTS).is_file() and not (folder / "checkpoints").exists()


class Exported:
    """Such a folder, read as the `Checkpoints` of a run with one step."""

    def __init__(self, folder: Path):
        self._file = folder / WEIGHTS
        try:
            with open_weights(self._file) as file:
                self._meta = parse_json(file.about[ABOUT])
            self._step, self._entry = int(self._meta["step"]), str(self._meta["entry"])
            build.from_json(self._meta["space"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(
                f"{self._file}: was not written by tools.convert_checkpoint: it lacks {ABOUT}"
            ) from error

    def steps(self) -> list[int]:
        """Its step."""
        return [self._step]

    def meta(self) -> dict[str, Any]:
        """The space of its data, as `build.from_json` takes it."""
        return self._meta["space"]

    def restore_part(self, target: Params, key: str, step: int | None = None) -> tuple[Params, dict[str, Any]]:
        """Its weights, and the meta. target: shapes and shardings. Errors as `Checkpoints.restore_part` has them."""
        if step not in (None, self._step):
            raise CheckpointError(f"no step {step} in {self._file}: it holds step {self._step}")
        if key != self._entry:
            raise ConfigError(f"{self._file} holds the weights {self._entry!r} alone, not {key!r}")
        wanted = sharding.by_name(target)
        with open_weights(self._file) as file:
            stored = {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in file.tree.items()}
            if problem := difference(stored, leaves_of(wanted)):
                raise UnfitCheckpointError(f"{self._file} does not fit its {FILE}: {problem}")
            arrays = [file[name] for name in wanted]
        tree = jax.tree.unflatten(jax.tree.structure(target), arrays)
        return sharding.put(tree, jax.tree.map(lambda leaf: leaf.sharding, target)), self.meta()
