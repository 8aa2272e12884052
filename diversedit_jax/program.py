"""What all programs share: flags, errors as one line with an exit code, and a stop that is asked for."""

import ast
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from diversedit_jax.errors import EXIT_PREEMPTED, ConfigError, RunError


class Stopped(Exception):
    """The program was asked to stop, and has saved."""


def launch(main: Callable[..., None], *, arguments: bool = False) -> None:
    """Parse the flags, run `main`, exit: 0 done, 42 stopped and saved, or an error's own code (see `errors`).

    With `arguments`, what stands beside the flags is given to `main` as a list; else it is an error.
    """
    app.define_help_flags()
    try:
        extra = parse(sys.argv)
        if extra and not arguments:
            raise ConfigError(f"unexpected argument {extra[0]!r}")
        main(*([extra] if arguments else []))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


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
        found[name] = ({"file": file} if file else {}) | {option: _literal(value) for option, _, value in more}
    return found


def _literal(text: str) -> Any:
    """A number or another value of Python, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@contextlib.contextmanager
def stop_requests(notify: Callable[[str], None]) -> Iterator[Callable[[], str | None]]:
    """Within it, Ctrl-C and SIGTERM end nothing at once; the function given tells which came first, or None.

    A second Ctrl-C interrupts as usual. Outside of the main thread signals are left as they are.
    """
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
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
