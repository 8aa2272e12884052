"""Checkpoints of a run: saved in the background, and verified to the last bit when they are read.

Orbax writes the arrays. It stores no checksums, does not name the array whose shape is wrong, and takes every directory
with an integer name for a checkpoint. Each step therefore also holds a record of ours: the shape, dtype and checksum of
every array, the caller's `meta`, and a CRC of the record.
"""

import contextlib
import gc
import json
import logging
import math
import os
import re
import stat
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
from orbax.checkpoint import checkpoint_managers as policies

from diversedit_jax.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpointError,
    MachineError,
    UnfitCheckpointError,
    check_machine,
)
from diversedit_jax.registry import in_range
from diversedit_jax.runtime import processes
from diversedit_jax.runtime.cli import silence
from diversedit_jax.runtime.files import write_json
from diversedit_jax.sharding import by_name
from diversedit_jax.training.checksums import checksums

SCORES = "scores.json"  # beside the steps: {step: value}, for keeping the best
FORMAT = 1  # of our record; raise it when old code could not read the new record
# In such a path orbax and tensorstore find other files than those there: they take it for a pattern or for a URL.
UNUSABLE = re.compile(r"[\\*?\[]|:/")
# How tensorstore's errors begin where the machine is to blame, and not what a file holds.
OF_MACHINE = re.compile(
    r"(PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|UNAUTHENTICATED|ABORTED|CANCELLED|UNKNOWN)\b"
)
State = Any  # a pytree of arrays


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """{name: array} as nested dicts: what is on disk, without the classes and empty nodes of an optax state."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in arrays.items()})


def difference(stored: Mapping[str, list], wanted: Mapping[str, list]) -> str | None:
    """How two {path: [shape, dtype]} differ, in one line; None if they are equal."""
    paths = list(dict.fromkeys([*wanted, *stored]))
    wrong = [path for path in paths if stored.get(path) != wanted.get(path)]
    if not wrong:
        return None
    has, needs = (" ".join(map(str, leaves.get(wrong[0], ["no such array"]))) for leaves in (stored, wanted))
    return f"{len(wrong)} of {len(paths)} arrays differ; first: {wrong[0]}: checkpoint has {has}, config needs {needs}"


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints in one directory. Opening and reading change nothing there; the first save makes it.

    Only one program may save in a directory. Its first save removes what killed saves left there.

    keep, keep_every: keep the newest so many steps, and every multiple of this step (0: none).
    best, lower: also keep so many steps with the best values given to `score`: the lowest, or the highest.
    """

    def __init__(
        self, directory: str | os.PathLike, *, keep: int = 3, keep_every: int = 0, best: int = 0, lower: bool = True
    ):
        silence()
        self.directory = Path(directory).absolute()
        if found := UNUSABLE.search(f"{self.directory}/"):
            raise ConfigError(
                f"checkpoints cannot be kept in {self.directory}: orbax misreads {found[0]!r} in a path. "
                "Take another path, or a symbolic link without it"
            )
        in_range("keep", keep, 1)
        self._keep, self._keep_every, self._best, self._lower = keep, keep_every, best, lower
        self._writer: ocp.CheckpointManager | None = None
        self._saving: int | None = None

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.suppress(CheckpointError) if error else contextlib.nullcontext():
            self.close()

    def steps(self) -> list[int]:
        """The complete steps on disk, in order."""
        found = []
        with contextlib.suppress(FileNotFoundError):  # nothing is saved yet
            for path in self.directory.iterdir():
                with contextlib.suppress(FileNotFoundError):  # it is being removed
                    # not is_dir: it takes a folder that cannot be looked at for none
                    if path.name.isdecimal() and stat.S_ISDIR(path.stat().st_mode):
                        found.append(int(path.name))
        return sorted(found)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of these steps to keep. Orbax asks its preservation policy, which is this object."""
        steps = [info.step for info in checkpoints]
        kept = self._kept(steps)
        return [step in kept for step in steps]

    def _kept(self, steps: Sequence[int]) -> set[int]:
        best = self.best_steps() if self._best else ()
        return {
            *steps[-self._keep :],
            *best,
            *(step for step in steps if self._keep_every and step % self._keep_every == 0),
        }

    def surplus(self) -> list[int]:
        """The steps on disk that the next save removes because an earlier run kept more."""
        steps = self.steps()
        return sorted(set(steps) - self._kept(steps))

    def score(self, step: int, value: float) -> None:
        """Store how good `step` is, for keeping the best. A value that is not finite is never among the best."""
        scores = self._scores() | {step: float(value)}
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_json(self.directory / SCORES, scores)

    def best_steps(self) -> list[int]:
        """The steps that are kept for their score, the best first. Of equal ones the older is better."""
        on_disk, sign = set(self.steps()), 1 if self._lower else -1
        stored = sorted(self._scores().items())
        scores = {step: sign * value for step, value in stored if step in on_disk and math.isfinite(value)}
        return sorted(scores, key=scores.get)[: self._best]

    def _scores(self) -> dict[int, float]:
        path = self.directory / SCORES
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return {int(step): float(value) for step, value in stored.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): remove it to forget scores") from error

    def save(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
        """Save `state`, a pytree of jax arrays, and `meta`, a JSON dict, in the background.

        Returns when the arrays are copied: the caller may donate them. CheckpointError if this or the last save fails.
        """
        self.wait()
        if (latest := self.latest()) is not None and step <= latest:
            raise CheckpointError(
                f"step {step} cannot be saved: {self.directory} already holds step {latest}. Resume from it, move the "
                f"steps from {step} on away, or use a new workdir."
            )
        arrays = by_name(state)
        body = {"step": step, "meta": meta, "leaves": leaves_of(arrays), "checksums": checksums(arrays)}
        body = json.loads(json.dumps(body))  # as it will be read back: the CRC must be the same
        record = {"format": FORMAT, "crc32": crc32(body), "body": body}
        with self._write_errors(step):
            self._writer = self._writer or self._new_writer()
            self._saving = step
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(nested(arrays)), meta=ocp.args.JsonSave(record))
            if not self._writer.save(step, args=items, force=True):
                raise CheckpointError(f"checkpoint {self.directory / str(step)}: orbax refused to save it")

    def wait(self) -> None:
        """Wait until the save under way is complete; CheckpointError if it fails."""
        if self._writer and self._saving is not None:
            with self._write_errors(self._saving):
                self._writer.wait_until_finished()
                self._saving = None

    def close(self) -> None:
        """Wait, then free the threads. The checkpoints can still be read, and a later save opens them again."""
        self.wait()
        writer, self._writer = self._writer, None
        if writer:
            writer.close()

    def restore(self, target: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """The state and meta of `step` (default: the latest), all verified. CheckpointError if that fails.

        target: a pytree of jax.ShapeDtypeStruct with shardings, on any mesh.
        """
        return self._read(step, partial(self._verified, target, ""))

    def restore_part(self, target: State, key: str, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """One top-level entry of the state, such as `ema`, and the meta. target: of that entry. Else as `restore`."""
        part, meta = self._read(step, partial(self._verified, {key: target}, f"{key}/"))
        return part[key], meta

    def meta(self, step: int | None = None) -> dict[str, Any]:
        """The meta of `step` (default: the latest), without its arrays. Errors as in `restore`."""
        return self._read(step, self._record)["meta"]

    def restore_newest(self, target: State) -> tuple[State, int, list[str]]:
        """The newest step that every process can read whole: its state, its number, and a line for each newer step.

        A damaged step is renamed to STEP.damaged-TIME, so that the run can save that step again. CheckpointError if no
        step is whole (the oldest is never renamed), if one cannot be read now, or if one does not fit the target.
        """
        notes, tried = [], []
        while True:
            step = processes.number_of_first(self.latest() or 0)
            problem, refusal = None, None
            try:
                state, _ = self.restore(target, step)
            except DamagedCheckpointError as error:
                problem = error.problem
            except CheckpointError as error:
                refusal = error
            if not processes.all_of(refusal is None):
                raise refusal or CheckpointError("another process cannot use the checkpoint; its message says why")
            if processes.all_of(problem is None):
                return state, step, notes
            tried.append(step)
            problem = problem or f"checkpoint {self.directory / str(step)} is damaged for another process"
            if step == min(self.steps(), default=step):
                raise CheckpointError(
                    f"no whole checkpoint in {self.directory}: tried {', '.join(map(str, tried))}; the last: {problem}"
                    ". Nothing was removed; to begin anew, use another workdir"
                )
            aside = f"{step}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
            processes.first_alone(partial(self._rename, step, aside))
            notes.append(f"{problem}; it is set aside as {aside}")

    def _rename(self, step: int, name: str) -> None:
        path = self.directory / str(step)
        try:
            path.rename(path.with_name(name))
        except OSError as error:
            raise CheckpointError(f"{path} is damaged and cannot be set aside as {name}: {error}") from error

    def _read(self, step: int | None, read: Callable[[int], Any]) -> Any:
        """read(step), with every failure as a CheckpointError. step None: the latest."""
        self.wait()
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"no step {step} in {self.directory}; it holds {', '.join(map(str, steps))}")
        with _failed_reads_silent():
            try:
                return read(step)
            except CheckpointError:
                raise
            except Exception as error:  # orbax raises many kinds, among them a bare Exception
                problem, reason = cause(error), not_of_content(error)
            time.sleep(0.1)  # the reads still under way fail too, while nothing is printed
            gc.collect()
        path = self.directory / str(step)
        if reason := unreadable(path) or reason:
            raise CheckpointError(f"checkpoint {path} cannot be read ({reason}). It was not changed")
        older = [other for other in steps if other < step]
        remedy = f"Move it away to {f'resume from step {older[-1]}' if older else 'start from the beginning'}."
        raise DamagedCheckpointError(f"checkpoint {path} is damaged ({problem})", remedy)

    def _verified(self, target: State, prefix: str, step: int) -> tuple[State, dict[str, Any]]:
        """The arrays of a step whose names begin with `prefix`, in the structure of `target`, and the meta."""
        wanted, error = by_name(target), None
        try:
            record = self._record(step)
            stored = {path: leaf for path, leaf in record["leaves"].items() if path.startswith(prefix)}
            if problem := difference(stored, leaves_of(wanted)):
                raise UnfitCheckpointError(
                    f"checkpoint {self.directory / str(step)} does not fit this config: {problem}. "
                    "Use its config, or another workdir"
                )
            with self._reader() as reader:
                arrays = by_name(reader.restore(step, args=ocp.args.Composite(state=partly(nested(wanted)))).state)
            if problem := difference(leaves_of(arrays), leaves_of(wanted)):
                raise ValueError(problem)
        except Exception as raised:  # orbax raises many kinds
            error = raised
        if not processes.all_of(error is None):  # all processes compute the checksums together, or none does
            raise error or ValueError("another process cannot read it")
        for path, value in checksums(arrays).items():
            if value != record["checksums"][path]:
                raise ValueError(f"wrong checksum of {path}")
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[path] for path in wanted]), record["meta"]

    def _record(self, step: int) -> dict[str, Any]:
        """The body of our record of a step: UnfitCheckpointError if it has a newer format, ValueError if damaged."""
        with self._reader() as reader:
            record = reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        return self._checked(record, step)

    def _checked(self, record: Mapping[str, Any], step: int) -> dict[str, Any]:
        """The body of a record. Errors as of `_record`."""
        if record["format"] != FORMAT:
            raise UnfitCheckpointError(
                f"checkpoint {self.directory / str(step)} has format {record['format']}, this version reads format "
                f"{FORMAT}: install the version that wrote it"
            )
        if record["crc32"] != crc32(record["body"]) or record["body"]["step"] != step:
            raise ValueError("wrong checksum of meta")
        return record["body"]

    def _new_writer(self) -> ocp.CheckpointManager:
        self.directory.mkdir(parents=True, exist_ok=True)
        _silence_failed_writes()
        return self._manager(
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the caller decides when
            preservation_policy=self,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._prove),
        )

    def _prove(self) -> None:
        """Read the record of the step under way, and its smallest array: this needs the whole index of the arrays.

        Orbax calls it before it gives the step its name and removes older ones. If it raises, both do not happen.
        """
        (folder,) = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        record = self._checked(json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8")), self._saving)
        name, (shape, dtype) = min(record["leaves"].items(), key=lambda item: math.prod(item[1][0]))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = nested({name: jax.ShapeDtypeStruct(shape, dtype, sharding=here)})
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone("proof"))
        arrays = by_name(handler.restore(folder / "state", args=partly(tree)))
        if checksums(arrays)[name] != record["checksums"][name]:
            raise ValueError(f"wrong checksum of {name}")

    def _reader(self) -> ocp.CheckpointManager:
        return self._manager(
            read_only=True, save_interval_steps=0, create=False, multiprocessing_options=alone("reader")
        )

    def _manager(self, **options: Any) -> ocp.CheckpointManager:
        # lightweight: it reads no old step, so that a damaged one cannot stop a save
        options = ocp.CheckpointManagerOptions(lightweight_initialize=True, **options)
        return ocp.CheckpointManager(self.directory, options=options)

    @contextlib.contextmanager
    def _write_errors(self, step: int) -> Iterator[None]:
        """Turn a failed write into a CheckpointError, and drop orbax's manager: the next one removes its leftovers."""
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


def partly(tree: Any) -> ocp.args.PyTreeRestore:
    """What orbax needs to restore a part of a state. tree: jax.ShapeDtypeStruct with shardings."""
    placed = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(tree, restore_args=placed, partial_restore=True)


def alone(prefix: str) -> ocp.options.MultiprocessingOptions:
    """A process by itself: else orbax would wait for the others, even for one that cannot read."""
    mine = jax.process_index()
    given = {"primary_host": mine, "active_processes": {mine}, "barrier_sync_key_prefix": f"{prefix}{mine}"}
    return ocp.options.MultiprocessingOptions(**(given if jax.process_count() > 1 else {}))


def not_of_content(error: BaseException) -> str | None:
    """The cause of a failed read, on one line, if it says nothing about what the files hold; else None."""
    while error.__cause__:
        error = error.__cause__
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    failed = (isinstance(error, OSError) and not missing) or OF_MACHINE.match(str(error))
    try:
        check_machine(error)
    except MachineError:
        failed = True
    return cause(error) if failed else None


def unreadable(folder: Path) -> str | None:
    """Why the bytes of a file in a folder cannot be had, on one line; None if all files can be read."""

    def refuse(error: OSError) -> None:
        raise error

    try:
        for place, _, names in os.walk(folder, onerror=refuse):
            for name in names:
                with open(os.path.join(place, name), "rb") as file:
                    while file.read(2**24):
                        pass
    except OSError as error:
        return cause(error)
    return None


def leaves_of(arrays: Mapping[str, Any]) -> dict[str, list]:
    """{path: [shape, dtype]} of arrays or ShapeDtypeStructs, as JSON gives it back."""
    return {path: [list(x.shape), jnp.dtype(x.dtype).name] for path, x in arrays.items()}


def crc32(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def cause(error: BaseException) -> str:
    """The first cause of an exception, on one line."""
    while error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split()) or "no message"
    text = text if len(text) <= 200 else f"{text[:120]} ... {text[-75:]}"
    return f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _failed_reads_silent() -> Iterator[None]:
    """Hide the tracebacks that orbax prints after a failed read, one for each coroutine that is destroyed."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    logger = logging.getLogger("asyncio")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        sys.unraisablehook, logger.disabled = hook, disabled


@cache
def _silence_failed_writes() -> None:
    """Hide, from now on, the tracebacks that orbax prints after a failed write. The failure itself is raised.

    Orbax closes its event loop at the first array that fails. Every other array under way then complains of that loop.
    """
    hook = sys.unraisablehook

    def unless_closed(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_closed
