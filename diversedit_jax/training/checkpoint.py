"""Checkpoints of a run: saved in the background, and verified to the last bit when they are read.

Orbax writes the arrays. It keeps no checksum of them, names no array when a shape does not fit, and takes every
directory with an integer for its name as a checkpoint, so each step also holds a record of ours: the shape, dtype and
checksum of every array, and the caller's `meta`, with a crc of itself. This is the only module that imports orbax.
"""

import contextlib
import gc
import json
import logging
import math
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jaxtyping import Array
from orbax.checkpoint import checkpoint_managers as policies

from diversedit_jax.errors import CheckpointError, DamagedCheckpointError, UnfitCheckpointError
from diversedit_jax.runtime import processes
from diversedit_jax.runtime.cli import silence
from diversedit_jax.runtime.files import write_json
from diversedit_jax.sharding import by_name
from diversedit_jax.training.checksums import checksums

SCORES = "scores.json"  # beside the steps: {step: value}, for keeping the best
FORMAT = 1  # of our record; a change that old code cannot read raises it
State = Any  # a pytree of arrays


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by name as nested dicts: what is on disk, free of the classes and empty nodes of an optax state."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in arrays.items()})


def difference(stored: Mapping[str, list], target: Mapping[str, list]) -> str | None:
    """What keeps the stored arrays {path: [shape, dtype]} from filling the target; None if they fit."""
    paths = list(dict.fromkeys([*target, *stored]))
    wrong = [path for path in paths if stored.get(path) != target.get(path)]
    if not wrong:
        return None

    def text(leaf: list | None) -> str:
        return f"{leaf[0]} {leaf[1]}" if leaf else "no such array"

    first = f"{wrong[0]}: checkpoint has {text(stored.get(wrong[0]))}, config needs {text(target.get(wrong[0]))}"
    return f"{len(wrong)} of {len(paths)} arrays differ; first: {first}"


class _Listed:
    """Orbax's question which steps to keep, answered by a function that lists them."""

    def __init__(self, listed: Callable[[], list[int]]):
        self._listed = listed

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = set(self._listed())
        return [info.step in kept for info in checkpoints]


class Checkpoints:
    """The checkpoints in one directory. Opening and reading change nothing there; the first save makes it.

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(100, state, {"seed": 0})
        state, meta = checkpoints.restore(target)  # target: jax.ShapeDtypeStruct with shardings

    Keeps the newest `keep` steps, every multiple of `keep_every`, and the `best` so many by the values that `score` was
    told, the lowest of them or, with `lower=False`, the highest. Only one program may save in a directory; its first
    save removes what killed saves left there.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        best: int = 0,
        lower: bool = True,
    ):
        silence()
        self.directory = Path(directory).absolute()
        self._best, self._lower = best, lower
        preserved = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        preserved += [_Listed(self.best_steps)] if best else []
        self._preservation = policies.AnyPreservationPolicy(preserved)
        self._writer: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.suppress(CheckpointError) if error else contextlib.nullcontext():
            self.close()

    def steps(self) -> list[int]:
        """The complete steps on disk, in order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def score(self, step: int, value: float) -> None:
        """Say how good `step` is, for keeping the best. What is not finite is worse than all that is."""
        scores = self._scores() | {step: float(value)}
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / SCORES, scores)

    def best_steps(self) -> list[int]:
        """The steps that are kept for their score, the best first; of equal ones the older."""
        sign = 1 if self._lower else -1
        finite = {step: value for step, value in self._scores().items() if math.isfinite(value)}
        on_disk = set(self.steps())
        ranked = sorted((step for step in finite if step in on_disk), key=lambda step: (sign * finite[step], step))
        return ranked[: self._best]

    def _scores(self) -> dict[int, float]:
        try:
            stored = json.loads((self.directory / SCORES).read_text(encoding="utf-8"))
            return {int(step): float(value) for step, value in stored.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.directory / SCORES} is damaged ({error}): remove it to forget scores"
            ) from error

    def save(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
        """Save `state`, a pytree of jax arrays, and `meta`, a JSON dict, in the background.

        Returns when the arrays are copied: the caller may donate them. Raises CheckpointError when the save cannot
        start, and when the save before it has failed; nothing new is saved then.
        """
        self.wait()
        if (latest := self.latest()) is not None and step <= latest:
            raise CheckpointError(
                f"step {step} cannot be saved: {self.directory} already holds step {latest}. Resume from it, move the "
                f"steps from {step} on away, or use a new workdir."
            )
        arrays = by_name(state)
        record = seal(step, meta, leaves_of(arrays), checksums(arrays))
        with self._surfacing(step):
            self._writer = self._writer or self._new_writer()
            self._saving = step
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(nested(arrays)), meta=ocp.args.JsonSave(record))
            if not self._writer.save(step, args=items, force=True):
                raise CheckpointError(f"checkpoint {self.directory / str(step)}: orbax refused to save it")

    def wait(self) -> None:
        """Wait until the save under way is complete; CheckpointError if it fails."""
        if self._writer and self._saving is not None:
            with self._surfacing(self._saving):
                self._writer.wait_until_finished()
                self._saving = None

    def close(self) -> None:
        """Wait, then free the threads. The checkpoints can still be read, and a later save starts anew."""
        self.wait()
        writer, self._writer = self._writer, None
        if writer:
            writer.close()

    def restore(self, target: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """The state and meta of `step` (default: the latest), each array verified.

        `target` is a pytree of jax.ShapeDtypeStruct with shardings: any mesh will do. Raises CheckpointError if there
        is no such step, if its arrays do not fit the target, and if anything in it is damaged.
        """
        return self._read(target, step, prefix="")

    def restore_part(self, target: State, key: str, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """One top-level entry of the state, such as `ema`, and the meta; `target` is that entry's. As `restore`."""
        part, meta = self._read({key: target}, step, prefix=f"{key}/")
        return part[key], meta

    def restore_newest(self, target: State) -> tuple[State, int, list[str]]:
        """The newest step that is whole on every process, its number, and a line for each newer one that is not.

        A damaged step is set aside, as STEP.damaged-TIME, for all processes, so that the run may save that step again;
        but for the oldest: without any whole step the run would begin anew, so that is an error, which says what was
        tried. Raises CheckpointError for a step that does not fit the target: an older one would not help.
        """
        said: list[str] = []
        tried: list[int] = []
        while True:
            step = processes.number_of_first(self.latest() or 0)
            problem = None
            try:
                state, _ = self.restore(target, step)
            except DamagedCheckpointError as error:
                problem = error.problem
            if processes.all_of(problem is None):
                return state, step, said
            tried.append(step)
            problem = problem or f"checkpoint {self.directory / str(step)} is damaged for another process"
            if step == min(self.steps(), default=step):
                steps = ", ".join(map(str, tried))
                raise CheckpointError(
                    f"no whole checkpoint in {self.directory}: tried {steps}; the last: {problem}. "
                    "Nothing was removed; to begin anew, use another workdir"
                )
            aside = self.directory / f"{step}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
            processes.first_alone(partial(_set_aside, self.directory / str(step), aside))
            said.append(f"{problem}; it is set aside as {aside.name}")

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of `step` (default: the latest), without its arrays. Errors as in `restore`."""
        return self._read({}, step, prefix=None)[1]

    def _read(self, target: State, step: int | None, prefix: str | None) -> tuple[State, dict[str, Any]]:
        self.wait()
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"no step {step} in {self.directory}; it holds {', '.join(map(str, steps))}")
        with last_words_unheard():
            try:
                return self._verified(target, step, prefix)
            except CheckpointError:
                raise
            except Exception as error:  # orbax raises many kinds, the bare Exception among them
                problem = cause(error)
            time.sleep(0.1)  # reads under way end too, and find nobody
            gc.collect()
        older = max((s for s in steps if s < step), default=None)
        onward = "start from the beginning" if older is None else f"resume from step {older}"
        raise DamagedCheckpointError(
            f"checkpoint {self.directory / str(step)} is damaged ({problem})", f"Move it away to {onward}."
        )

    def _verified(self, target: State, step: int, prefix: str | None) -> tuple[State, dict[str, Any]]:
        wanted = by_name(target)
        if prefix is None:
            return {}, self._record(step)["meta"]
        record, arrays, error = None, None, None
        try:
            record = self._record(step)
            arrays = self._arrays(step, record, wanted, prefix)
        except Exception as raised:  # orbax raises many kinds
            error = raised
        if not processes.all_of(error is None):  # before the checksums, which all processes compute together
            raise error or ValueError("another process cannot read it")
        for path, value in checksums(arrays).items():
            if value != record["checksums"][path]:
                raise ValueError(f"wrong checksum of {path}")
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[path] for path in wanted]), record["meta"]

    def _record(self, step: int) -> dict[str, Any]:
        """Our record of a step."""
        with self._reader() as reader:
            stored = reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        return unseal(stored, self.directory / str(step))

    def _arrays(self, step: int, record: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> dict[str, Array]:
        """The arrays of a step whose names begin with `prefix`; CheckpointError if those are not the wanted ones."""
        stored = {path: leaf for path, leaf in record["leaves"].items() if path.startswith(prefix)}
        if problem := difference(stored, leaves_of(wanted)):
            raise UnfitCheckpointError(
                f"checkpoint {self.directory / str(step)} does not fit this config: {problem}. "
                "Use its config, or another workdir"
            )
        abstract = nested(wanted)
        part = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        with self._reader() as reader:
            arrays = by_name(reader.restore(step, args=ocp.args.Composite(state=part)).state)
        if problem := difference(leaves_of(arrays), leaves_of(wanted)):
            raise ValueError(problem)
        return arrays

    def _new_writer(self) -> ocp.CheckpointManager:
        self.directory.mkdir(parents=True, exist_ok=True)
        closed_loops_unheard()
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=policies.FixedIntervalPolicy(1),  # the caller decides when
                preservation_policy=self._preservation,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                lightweight_initialize=True,  # reads no old step, so a damaged one cannot stop a save
            ),
        )

    def _reader(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                read_only=True,
                save_interval_steps=0,
                create=False,
                lightweight_initialize=True,
                multiprocessing_options=_alone(),
            ),
        )

    @contextlib.contextmanager
    def _surfacing(self, step: int) -> Iterator[None]:
        """Turn a failed write into one line, and drop orbax's manager: the next one removes the unfinished files."""
        try:
            yield
        except Exception as error:
            writer, self._writer, self._saving = self._writer, None, None
            with contextlib.suppress(Exception):
                writer.close()
            if isinstance(error, CheckpointError):
                raise
            whole = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} could not be written ({cause(error)}). Whole steps: {whole}."
            ) from error


def _alone() -> ocp.options.MultiprocessingOptions:
    """Reading is each process's own affair: orbax would wait for the others, and for ever where one cannot read."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    mine = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"reader{mine}"
    )


def _set_aside(step: Path, aside: Path) -> None:
    try:
        os.rename(step, aside)
    except OSError as error:
        raise CheckpointError(f"{step} is damaged and cannot be set aside as {aside.name}: {error}") from error


def leaves_of(arrays: Mapping[str, Any]) -> dict[str, list]:
    """{path: [shape, dtype]} of arrays or ShapeDtypeStructs, as it reads back from JSON."""
    return {path: [list(x.shape), jnp.dtype(x.dtype).name] for path, x in arrays.items()}


def seal(step: int, meta: Mapping[str, Any], leaves: dict[str, list], sums: dict[str, int]) -> dict[str, Any]:
    """Our record of one step, with a crc of itself."""
    body = json.loads(json.dumps({"step": step, "meta": meta, "leaves": leaves, "checksums": sums}))
    return {"format": FORMAT, "crc32": crc32(body), "body": body}


def unseal(record: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """The body of a record that is whole; CheckpointError if a newer format, ValueError if damaged."""
    if record["format"] != FORMAT:
        raise UnfitCheckpointError(
            f"checkpoint {place} has format {record['format']}, this version reads format {FORMAT}: "
            "install the version that wrote it"
        )
    if record["crc32"] != crc32(record["body"]) or record["body"]["step"] != int(place.name):
        raise ValueError("wrong checksum of meta")
    return record["body"]


def crc32(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def cause(error: BaseException) -> str:
    """What lies at the bottom of an exception, as a short phrase on one line."""
    while error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split()) or "no message"
    text = text if len(text) <= 200 else f"{text[:120]} ... {text[-75:]}"
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def last_words_unheard() -> Iterator[None]:
    """Silence for what orbax leaves when a read fails: each coroutine that is destroyed prints a traceback."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    logger = logging.getLogger("asyncio")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        sys.unraisablehook, logger.disabled = hook, disabled


@cache
def closed_loops_unheard() -> None:
    """Silence, from now on, for what orbax leaves when a write fails: it closes its event loop at the first array that
    fails, and every other one that is under way prints a traceback of that loop. The failure itself is raised.
    """
    hook = sys.unraisablehook

    def unless_closed(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_closed
