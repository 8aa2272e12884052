"""One run at a time in a directory: a lock file that its holder touches regularly. It also works on network mounts."""

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


@contextlib.contextmanager
def held(directory: Path, say: Callable[[str], None], touched: float = 20.0, gone: float = 60.0) -> Iterator[None]:
    """Hold the lock of a directory, and touch it every `touched` seconds. ConfigError if a running process holds it.

    The lock of a killed process is taken over: at once if it ran on this host, else when nobody has touched the lock
    for `gone` seconds. The clocks of the hosts need not agree.
    """
    path = directory / FILE
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    while True:
        try:
            with open(path, "x", encoding="utf-8") as file:
                json.dump(mine, file)
            break
        except FileExistsError:
            holder = _read(path)
            _wait_until_gone(path, holder, say, gone)
            if _read(path) == holder:  # else another process has taken it over by now
                path.unlink(missing_ok=True)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(touched):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, daemon=True, name="workdir lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _wait_until_gone(path: Path, holder: dict[str, Any], say: Callable[[str], None], gone: float) -> None:
    """Return when the holder of a lock is gone; ConfigError if it is running."""
    host, pid = holder.get("host"), holder.get("pid")
    about = f"process {pid} on {host}, since {holder.get('started')}"
    refusal = ConfigError(f"{path.parent} is in use by {about}: wait until it ends, or use another workdir")
    if host == socket.gethostname():
        if _running(pid):
            raise refusal
        return
    say(f"{path.parent} was in use by {about}: waiting {gone:.0f} s for a sign of life")
    with contextlib.suppress(OSError):  # the lock may disappear
        before, deadline = path.stat().st_mtime, time.monotonic() + gone
        while time.monotonic() < deadline:
            time.sleep(min(1.0, gone / 10))
            if path.stat().st_mtime != before:
                raise refusal


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _running(pid: Any) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False  # Our own pid in the file means a stale lock: the pid was reused.
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
