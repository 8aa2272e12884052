"""One run at a time in a directory: a lock file that its holder touches now and then, also over a network mount."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diversedit_jax.errors import ConfigError

FILE = ".lock"
TOUCHED = 20.0  # seconds between two touches
GONE = 60.0  # seconds without one after which the holder is gone


@contextlib.contextmanager
def held(directory: Path, say: Callable[[str], None], touched: float = TOUCHED, gone: float = GONE) -> Iterator[None]:
    """Hold the lock of a directory. ConfigError, within seconds, if a running process holds it.

    A lock that a killed process left is taken over: at once if it ran on this host, else when nobody has touched it for
    `gone` seconds. Clocks of hosts are not compared.
    """
    path = directory / FILE
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    _take(path, mine, say, gone)
    ended = threading.Event()
    thread = threading.Thread(target=_touch, args=(path, ended, touched), daemon=True, name="workdir lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _take(path: Path, mine: dict[str, Any], say: Callable[[str], None], gone: float) -> None:
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(mine, file)
            return
        except FileExistsError:
            holder = _read(path)
            _wait_until_gone(path, holder, mine, say, gone)
            if _read(path) == holder:  # else somebody else has taken it over by now
                path.unlink(missing_ok=True)


def _wait_until_gone(
    path: Path, holder: dict[str, Any], mine: dict[str, Any], say: Callable[[str], None], gone: float
) -> None:
    """Return when the holder of a lock is gone; ConfigError if it is there."""
    here = holder.get("host") == mine["host"]
    if here and not _alive(holder.get("pid")):
        return
    about = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"
    refusal = f"{path.parent} is in use by {about}: wait until it ends, or use another workdir"
    if here:
        raise ConfigError(refusal)
    say(f"{path.parent} was in use by {about}: waiting {gone:.0f} s for a sign of life")
    before, deadline = _modified(path), time.monotonic() + gone
    while time.monotonic() < deadline:
        time.sleep(min(1.0, gone / 10))
        now = _modified(path)
        if now is None:
            return
        if now != before:
            raise ConfigError(refusal)


def _touch(path: Path, ended: threading.Event, every: float) -> None:
    while not ended.wait(every):
        with contextlib.suppress(OSError):
            os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False  # a lock of this very process is one that a former process of the same number left
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
