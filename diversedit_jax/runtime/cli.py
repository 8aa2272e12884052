"""What all programs share: flags, errors as one line with an exit code, and a stop that is asked for."""

import ast
import contextlib
import errno
import faulthandler
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from jax.experimental import multihost_utils

from diversedit_jax.errors import EXIT_PREEMPTED, ConfigError, RunError, StorageError
from diversedit_jax.runtime import processes


class Stopped(Exception):
    """The program was asked to stop, and has saved."""


def launch(main: Callable[..., None], *, arguments: bool = False, several: bool = False) -> None:
    """Parse the flags, run `main`, exit: 0 done, 42 stopped and saved, or an error's own code (see `errors`).

    arguments: what stands beside the flags is given to `main` as a list; else it is an error. several: the program may
    be one of several processes, which find each other first.
    """
    app.define_help_flags()
    if several:
        processes.define_flags()
        flags.adopt_module_key_flags(processes)
    try:
        extra = parse(sys.argv)
        if extra and not arguments:
            raise ConfigError(f"unexpected argument {extra[0]!r}")
        if several:
            processes.start(flags.FLAGS)
        with storage():
            main(*([extra] if arguments else []))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)  # all processes are here, and leave together
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        processes.leave(130)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(error.exit_code)
    except Exception:
        traceback.print_exc()
        processes.leave(1)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def storage() -> Iterator[None]:
    """Within it, a disk that takes no more is a StorageError: metrics, samples and the like are written everywhere."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" {error.filename}" if error.filename else " a file"
        raise StorageError(
            f"cannot write{where}: {error.strerror}. Whole checkpoints stay; run it again when there is space"
        ) from error


def parse(argv: Sequence[str]) -> list[str]:
    """Parse flags and config overrides; returns the other arguments. Whatever is wrong becomes a ConfigError."""
    for path in [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]:
        sys.path.append(str(Path(path).absolute().parent.parent))  # a config file may import its neighbours
    try:
        extra = flags.FLAGS(argv)[1:]
        if "config" in flags.FLAGS:
            hasattr(flags.FLAGS["config"].value, "keys")  # raises if the file could not be loaded
    except RunError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        raise ConfigError(readable(error)) from error
    return extra


def readable(error: Exception) -> str:
    """A flag's error on one line, an unknown config key and a missing file in our words."""
    lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines()] or [type(error).__name__]
    given = FLAG_NAMES.findall(lines[0])
    if isinstance(error, AttributeError | KeyError) and given:
        meant = FLAG_NAMES.findall(lines[1])[:1] if len(lines) > 1 and "Did you mean" in lines[1] else []
        return f"config: no key {given[0]!r}" + (f"; did you mean {meant[0]!r}?" if meant else "")
    if isinstance(error, FileNotFoundError) or "No such file" in lines[-1]:
        return f"config: file {error.filename or FLAG_NAMES.findall(lines[-1])[-1]} not found"
    if "must have a value other than None" in lines[0]:
        return f"{lines[0].split('=')[0]} is required"
    return lines[0]


FLAG_NAMES = re.compile(r"['\"]([\w./-]+)['\"\\]")


def named_files(flag: str, given: Sequence[str], required: bool = False) -> dict[str, dict[str, Any]]:
    """What a flag `NAME=FILE,OPTION=VALUE,...` that may come several times says: name -> options, `file` among them.

    required: the file may not be left out. Raises ConfigError for another form.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        (name, _, file), *more = (part.partition("=") for part in text.split(","))
        if not name or (required and not file) or not all(option and value for option, _, value in more):
            raise ConfigError(f"--{flag}={text}: wanted NAME=FILE, or NAME=FILE,OPTION=VALUE,...")
        if name in found:
            raise ConfigError(f"--{flag}={text}: {name} is given twice")
        found[name] = ({"file": file} if file else {}) | {option: literal(value) for option, _, value in more}
    return found


def literal(text: str) -> Any:
    """A number or another value of Python, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@contextlib.contextmanager
def stop_requests(notify: Callable[[str], None]) -> Iterator[Callable[[int], str | None]]:
    """Within it, Ctrl-C and SIGTERM end nothing at once; the function given tells which came first, or None.

    A second Ctrl-C interrupts as usual. Outside of the main thread signals are left as they are. Of several processes
    all must ask the function at every step, with its number: it answers all of them alike, at the same step, whichever
    was asked to stop.
    """
    if jax.process_count() > 1:
        with interrupts_as_stops(notify):
            yield lambda step: "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return
    received: list[str] = []

    def receive(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        notify(f"{received[0]}: saving after this step (Ctrl-C again quits at once)")

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield lambda step: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupts_as_stops(notify: Callable[[str], None]) -> Iterator[None]:
    """Within it, Ctrl-C is a SIGTERM to this process, for which jax stops all of them; it keeps the handler of that."""

    def receive(number, frame):
        signal.signal(signal.SIGINT, before)
        notify("Ctrl-C: stopping all processes after a step (Ctrl-C again quits at once)")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGINT)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[bool], None]]:
    """Within it, a program that does not say for so many seconds that it is alive writes the stacks of all its threads
    and ends, by SIGALRM: a launcher sees code 142, which asks for a restart. 0: no watch is kept.

    The function given says that it is alive; with False, that it will be quiet for a while. It works where the program
    hangs in a library, too.
    """
    if not seconds or not hasattr(signal, "SIGALRM"):
        yield lambda watched=True: None
        return

    def alive(watched: bool = True) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, seconds + 1 if watched else 0)
        if watched:
            faulthandler.dump_traceback_later(seconds, exit=False, file=sys.__stderr__)

    alive()
    try:
        yield alive
    finally:
        alive(False)


def silence() -> None:
    """Keep the routine messages of our libraries off the terminal; what matters in them reaches ours as errors."""
    absl = logging.getLogger("absl")  # orbax and grain log through it
    if _not_routine not in absl.filters:
        absl.addFilter(_not_routine)
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns at each NaN


def _not_routine(record: logging.LogRecord) -> bool:
    """Orbax logs, with a traceback, errors that it also raises: all of it is dropped. Grain keeps its warnings."""
    source = record.pathname.replace(os.sep, "/")
    return not ("/orbax/" in source or ("/grain/" in source and record.levelno < logging.WARNING))
