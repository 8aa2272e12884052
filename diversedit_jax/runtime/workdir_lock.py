"""One run at a time in a directory.

A run holds two things:

- `flock` on the directory itself. The kernel gives it to one process of a host, in whichever container, and takes it
  back when the process ends, however it ends. Names of hosts and numbers of processes play no part.
- A lease for the other hosts of a network mount: the file `.lock`, which names the holder and which the holder touches
  regularly. It is created exclusively. It is taken over when nobody has touched it for `gone` seconds; the clocks of
  the hosts need not agree. If its holder had the same kernel and mount, the free `flock` shows that the holder is dead,
  and the lease is taken over at once.

What holds where:

- Local disks, also those that other hosts mount: one holder on this host, always.
- NFS, and gcsfuse without cached metadata (as launch/ mounts it): one holder for each mount of a host, always. Of two
  hosts that start together one gets the lease, for the server creates a file once. A takeover from another host is as
  safe as a lease can be: a holder that hangs for longer than `gone` loses it, and learns so before it writes again.
- gcsfuse with cached metadata: one holder for each mount of a host. Other mounts may not see the lease.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from diversedit_jax.errors import ConfigError, StorageError

FILE = ".lock"
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of the running kernel, the same in all its containers


@contextlib.contextmanager
def held(
    directory: Path, say: Callable[[str], None], touched: float = 20.0, gone: float = 90.0
) -> Iterator[Callable[[], None]]:
    """Hold the lock of a directory. Yields a function that raises ConfigError if the lock was lost since.

    ConfigError if a running process holds it; StorageError if the directory cannot be locked.
    touched: seconds between two touches of the lease. gone: seconds without a touch after which its holder is dead.
    """
    path = directory / FILE
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}

    def check() -> None:
        try:
            found = path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            same = directory.is_dir() and os.path.samestat(directory.stat(), os.fstat(folder))
            what = f"{path if same else directory} was removed or moved while this run used it"
            raise ConfigError(f"{what}: this run ends, and saves nothing more") from None
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        if found != text:
            raise ConfigError(f"{directory} was taken over by {_holder(found)}: this run ends, and saves nothing more")

    with contextlib.ExitStack() as stack:
        try:
            folder = os.open(directory, os.O_RDONLY)
            stack.callback(os.close, folder)
            kernel = BOOT.read_text().strip() if BOOT.exists() else None
            mine |= {"kernel": kernel, "mount": os.fstat(folder).st_dev, "token": uuid.uuid4().hex}
            text = json.dumps(mine)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _refusal(directory, _seen(folder)) from None
            _take(directory, folder, text, say, gone)
        except OSError as error:
            raise StorageError(f"{directory} cannot be locked: {error.strerror}") from error

        ended = threading.Event()

        def touch() -> None:
            while not ended.wait(touched):
                with contextlib.suppress(OSError):
                    if _seen(folder).text == text:
                        os.utime(FILE, dir_fd=folder)

        thread = threading.Thread(target=touch, daemon=True, name="workdir lock")
        thread.start()
        try:
            yield check
        except Exception:
            check()  # a lost lock is the better explanation
            raise
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError):
                if _seen(folder).text == text:
                    os.unlink(FILE, dir_fd=folder)


class _Seen(NamedTuple):
    """A lease as it lies there. text: None if there is none."""

    text: str | None
    touched: int = 0


def _take(directory: Path, folder: int, text: str, say: Callable[[str], None], gone: float) -> None:
    """Write the lease of the process that has the `flock`. ConfigError if it is that of a running process."""
    mine, waited = json.loads(text), False
    while not _created(folder, text):
        before = _seen(folder)
        if before.text is not None and not _dead(_parsed(before.text), mine):
            say(f"{directory} was in use by {_holder(before.text)}: waiting {gone:.0f} s for a sign of life")
            _wait_until_gone(directory, folder, before, gone)
            waited = True
        if _seen(folder) == before:  # else another host was faster
            with contextlib.suppress(FileNotFoundError):
                os.unlink(FILE, dir_fd=folder)
    if waited:
        time.sleep(gone / 10)  # another host that has waited, too, may just now remove ours: the last one wins
    if (now := _seen(folder)).text != text:
        raise _refusal(directory, now)


def _dead(other: dict, mine: dict) -> bool:
    """Whether the process that left the lease `other` is dead, as this one has the `flock`. False: not known."""
    return mine["kernel"] is not None and all(other.get(name) == mine[name] for name in ("kernel", "mount"))


def _created(folder: int, text: str) -> bool:
    """Write a new lease. False if there is one."""
    try:
        with _opened(folder, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:  # gcsfuse: when the file was closed, that of another mount was there
            return False
        raise
    return True


def _wait_until_gone(directory: Path, folder: int, before: _Seen, gone: float) -> None:
    """Return when the lease is gone, or was not touched for so many seconds; ConfigError if it is touched."""
    deadline = time.monotonic() + gone
    while time.monotonic() < deadline:
        time.sleep(min(1.0, gone / 10))
        now = _seen(folder)
        if now.text is None:
            return
        if now != before:
            raise _refusal(directory, now)


def _seen(folder: int) -> _Seen:
    """The lease. The file is opened each time: only so does a network mount ask its server."""
    try:
        with _opened(folder, "r") as file:
            return _Seen(file.read(), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return _Seen(None)


def _opened(folder: int, mode: str) -> IO[str]:
    """The file of the lease in the directory that is locked, wherever that is now."""
    return open(
        FILE,
        mode,
        encoding="utf-8",
        errors="replace",
        opener=lambda name, flags: os.open(name, flags, 0o666, dir_fd=folder),
    )


def _parsed(text: str | None) -> dict:
    """What a lease says; nothing if it is torn."""
    try:
        found = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holder(text: str | None) -> str:
    """The holder of a lease, in words, on one line."""
    found = _parsed(text)
    if not {"pid", "host", "started"} <= found.keys():
        return "a process that did not write its name"
    return " ".join(f"process {found['pid']} on {found['host']}, since {found['started']}".split())[:200]


def _refusal(directory: Path, seen: _Seen) -> ConfigError:
    return ConfigError(f"{directory} is in use by {_holder(seen.text)}: wait until it ends, or use another workdir")
