"""What all programs share: flags, errors as one line with an exit code, and stopping on request."""

import ast
import contextlib
import errno
import faulthandler
import itertools
import logging
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from diversedit_jax.errors import EXIT_PREEMPTED, ConfigError, MachineError, RunError, StorageError, check_machine
from diversedit_jax.registry import one_of
from diversedit_jax.runtime import help_page, processes
from diversedit_jax.runtime.progress import QUIET

NAME = re.compile(r"['\"]([\w./-]+)['\"\\]")  # a quoted name in an error of absl or ml_collections
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # the disk takes no more


class Stopped(Exception):
    """The program was asked to stop, and has saved."""


class Interrupted(BaseException):
    """The program was asked to stop: leave what can be done again, and save. No `except Exception` holds it up."""


class Output:
    """A stream to which writing may fail: the pipe is closed, the disk is full. The program goes on and saves."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, BrokenPipeError):  # nobody will read any more, nor what Python still keeps for them
                nowhere(self._stream.fileno())


def nowhere(descriptor: int) -> None:
    """Let what is written to a file descriptor vanish."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def let_output_fail() -> None:
    """Let the program go on without its output, also where the caller has closed it."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would be taken for it
            nowhere(descriptor)
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (open to the end)
        setattr(sys, name, Output(stream))


def launch(
    main: Callable[..., None],
    *,
    arguments: bool = False,
    several: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Parse the flags, run `main`, exit: 0 done, 42 stopped and saved, or an error's own code (see `errors`).

    arguments: give `main` the list of arguments that are not flags; else they are an error.
    several:   the program may be one of several processes; they find each other first.
    groups:    title -> names of the flags that `--help` shows under it.
    """
    let_output_fail()
    flags.DEFINE_bool(QUIET, False, "Print results and errors only: no progress, no notes.")
    if several:
        processes.define_flags()
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(page(several, groups or {}))
        return
    try:
        extra = parse(sys.argv)
        if extra and not arguments:
            raise ConfigError(f"unexpected argument {extra[0]!r}")
        if several:
            processes.start(flags.FLAGS)
        main(*([extra] if arguments else []))
        code = 0
    except Stopped as stop:
        print(stop, file=sys.stderr)
        code = EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        processes.leave(130)
    except Exception as error:
        error = of_machine(error)
        if not isinstance(error, RunError):
            traceback.print_exc()
            processes.leave(1)
        print(f"error: {error}", file=sys.stderr)
        processes.leave(error.exit_code)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python takes a second to end, which must not change the code
    sys.exit(code)  # all processes stop at the same step, and leave together


def page(several: bool, groups: Mapping[str, Sequence[str]]) -> str:
    """The help of the running program. several, groups: see `launch`."""
    own = [*flags.FLAGS.get_key_flags_for_module(sys.argv[0]), flags.FLAGS[QUIET]]
    if several:
        own += [flags.FLAGS[name] for name in processes.NAMES]
        groups = {**groups, "Several processes, where they do not find each other": processes.NAMES}
    width = min(shutil.get_terminal_size((100, 0)).columns, 120)
    return help_page.page(sys.modules["__main__"].__doc__ or "", own, groups, width)


def of_machine(error: Exception) -> Exception:
    """The error of one line for what the machine refuses: memory, space, permission. Else the error itself."""
    try:
        check_machine(error)
    except MachineError as lack:
        return lack
    text = " ".join(str(error).split())
    if isinstance(error, jax.errors.JaxRuntimeError) and text.startswith("RESOURCE_EXHAUSTED"):
        remedy = "take a smaller batch, config.accumulate, config.mesh.fsdp or config.model.remat"
        return MachineError(f"the memory of a device does not suffice ({text[:200]}): {remedy}")
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return ConfigError(text)  # jax says which, and what JAX_PLATFORMS may be
    if isinstance(error, OSError) and error.errno in FULL:  # whichever file was written
        place = f"cannot write {error.filename or 'a file'}: {error.strerror}"
        return StorageError(f"{place}. Whole checkpoints stay; run it again when there is space")
    if isinstance(error, OSError) and error.filename is not None:  # no permission, a mount that fails
        return StorageError(f"{error.filename}: {error.strerror}")
    return error


def parse(argv: Sequence[str]) -> list[str]:
    """Parse flags and config overrides; returns the other arguments. Every mistake becomes a ConfigError."""
    argv = ["--explain=config" if argument == "--explain" else recipe(argument) for argument in argv]
    given = [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    file = Path(given[-1].split(":")[0]) if given else Path()
    if given:  # modules of its user lie beside a config file, or in the folder above
        sys.path += [str(folder) for folder in file.absolute().parents[:2] if str(folder) not in sys.path]
    try:
        extra = flags.FLAGS(argv)[1:]
        for name in flags.FLAGS:
            value = flags.FLAGS[name].value if flags.FLAGS[name].present else None
            if value == "" and flags.FLAGS[name].default is None:
                # An unset variable in a script. A path that is empty would be the current directory.
                raise ConfigError(f"--{name} is empty: give it a value, or leave it out")
            if isinstance(value, str) and "://" in value and not name.startswith("config."):
                # As a Path it would lose a slash, and become a new folder `gs:` here.
                mount = "mount the bucket (gcsfuse) or copy it"
                raise ConfigError(f"--{name}: {value} is not a path of this machine: {mount}")
        if "" in extra:
            raise ConfigError(f"argument {extra.index('') + 1} is empty")
        if "config" in flags.FLAGS:
            hasattr(flags.FLAGS["config"].value, "keys")  # raises if the file could not be loaded
    except Exception as error:
        raise ConfigError(in_config_file(error, file) or readable(error, argv)) from error
    return extra


def recipe(argument: str) -> str:
    """The argument, with the path of its file for a recipe of the package: `--config=digits`, `--config=repa:xl2`."""
    flag, _, value = argument.partition("=")
    name, colon, variant = value.partition(":")
    known = help_page.recipes() if flag == "--config" and name.isidentifier() else ()
    if not known or (name not in known and Path(name).exists()):
        return argument
    return f"{flag}={help_page.CONFIGS / one_of('--config', name, known)}.py{colon}{variant}"


def in_config_file(error: BaseException, file: Path) -> str | None:
    """An error that a config file has caused: its place and its reason on one line. None for any other error."""
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    for one in reversed(chain):
        frames = traceback.extract_tb(one.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == file.absolute()]
        if isinstance(one, SyntaxError) and Path(one.filename or "").absolute() == file.absolute():
            return f"{file}, line {one.lineno}: {one.msg}"
        if lines:
            return f"{file}, line {lines[-1]}: {unknown_key(one) or reason(one)}"
    text = reason(chain[-1])
    if "has no attribute 'get_config'" in text:
        return f"{file} has no function get_config()"
    if "get_config() takes 0 positional arguments" in text:
        return f"{file} has no variants: leave out what follows the colon"
    if "get_config() missing 1 required positional argument" in text:
        return f"{file} needs a variant: --config={file.name}:VARIANT"
    if "--config must have a value other than None" in text and file.is_file():
        return f"{file}: get_config() returns None, wanted the config"
    return None


def reason(error: BaseException) -> str:
    """What an error says, on one line; with its kind, if that is not in our words."""
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, RunError | ImportError | flags.Error) else f"{type(error).__name__}: "
    return f"{kind}{text}" if text else type(error).__name__


def unknown_key(error: BaseException) -> str | None:
    """The words for a key that a config does not have, with the nearest one. None for another error."""
    lines = str(error).replace("\\n", "\n").splitlines()
    if not isinstance(error, AttributeError | KeyError) or "has no attribute" in str(error):  # those are Python's
        return None
    given = NAME.findall(lines[0]) if lines else []
    if not given:
        return None
    meant = NAME.findall(lines[1])[:1] if len(lines) > 1 and "Did you mean" in lines[1] else []
    return f"no key {given[0]!r}" + (f"; did you mean {meant[0]!r}?" if meant else "")


def readable(error: Exception, argv: Sequence[str] = ()) -> str:
    """The error of a flag on one line; for an unknown config key, a missing file or a missing flag in our words."""
    if unknown := unknown_key(error):
        wrong = NAME.findall(str(error))[0]
        keys = (argument.partition("=")[0].removeprefix("--") for argument in argv if argument.startswith("--config."))
        return f"{next((key for key in keys if wrong in key.split('.')), 'config')}: {unknown}"
    lines = [line.strip() for line in str(error).replace("\\n", "\n").splitlines()] or [type(error).__name__]
    if isinstance(error, FileNotFoundError) or "No such file" in lines[-1]:
        return f"config: file {getattr(error, 'filename', None) or NAME.findall(lines[-1])[-1]} not found"
    if missing := re.search(r"Flag (--\w+) must have a value other than None", lines[0]):
        return f"flag {missing[1]} is required"
    return lines[0]


def named_files(flag: str, given: Sequence[str], required: bool = False) -> dict[str, dict[str, Any]]:
    """The values of a flag NAME=FILE,OPTION=VALUE,... that may be repeated: name -> options, with `file` among them.

    required: the file may not be left out. ConfigError for another form.
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
    """The Python literal that the text is, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Handle these signals within the context. Outside of the main thread they are left as they are."""
    before = {}
    with contextlib.suppress(ValueError):  # not the main thread
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def stop_requests(notify: Callable[[str], None]) -> Iterator[Callable[[], str | None]]:
    """Turn Ctrl-C and SIGTERM into requests to stop. Yields a function: the name of the first signal, or None.

    A second Ctrl-C interrupts at once. All processes must ask equally often: all then get the same answer.
    """
    received: list[str] = []
    asked = itertools.count()

    def say(text: str) -> None:
        with contextlib.suppress(Exception):  # the signal may have come in the middle of a print
            notify(text)

    def receive(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        say(f"{received[0]}: saving after this step (Ctrl-C again quits at once)")

    def pass_on(number, frame):  # jax stops all processes at a SIGTERM, with a handler of its own
        signal.signal(signal.SIGINT, interrupt)
        say("Ctrl-C: stopping all processes after a step (Ctrl-C again quits at once)")
        os.kill(os.getpid(), signal.SIGTERM)

    def together() -> str | None:
        if not received and multihost_utils.reached_preemption_sync_point(next(asked)):  # true only once
            received.append("SIGTERM")
        return received[0] if received else None

    interrupt = signal.getsignal(signal.SIGINT)
    if jax.process_count() > 1:
        with handling(pass_on, signal.SIGINT):
            yield together
    else:
        with handling(receive, signal.SIGINT, signal.SIGTERM):
            yield lambda: received[0] if received else None


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[bool], None]]:
    """End a program that gives no sign of life for so many seconds: code 142, which asks for a restart. 0: never.

    It first writes the stacks of all threads. Yields alive(): a sign of life; alive(False): pause until the next one.
    Ctrl-Z pauses it, too.
    """
    if not seconds or not hasattr(signal, "SIGALRM"):
        yield lambda watched=True: None
        return
    watching = False

    def alive(watched: bool = True) -> None:
        nonlocal watching
        watching = watched
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, seconds + 1 if watched else 0)
        if watched:
            faulthandler.dump_traceback_later(seconds, exit=False, file=2)

    def pause(number, frame):
        before = watching
        alive(False)
        os.kill(os.getpid(), signal.SIGSTOP)  # until the shell continues it
        alive(before)

    with handling(pause, signal.SIGTSTP):
        alive()
        try:
            yield alive
        finally:
            alive(False)


def silence() -> None:
    """Keep routine messages of our libraries off the terminal. What matters in them is raised as an error anyway."""
    absl = logging.getLogger("absl")  # orbax and grain log through it
    if _not_routine not in absl.filters:
        absl.addFilter(_not_routine)
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns at each NaN


def _not_routine(record: logging.LogRecord) -> bool:
    """False for messages of orbax, which also raises its errors, and for messages of grain below a warning."""
    source = record.pathname.replace(os.sep, "/")
    return not ("/orbax/" in source or ("/grain/" in source and record.levelno < logging.WARNING))
