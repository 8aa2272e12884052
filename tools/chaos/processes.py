"""Programs as one or several processes on this machine, each with some simulated devices, which meet at an address.

What tools.chaos and the tests of faults start, disturb and kill.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Root may write anywhere; without this right it meets a read-only directory as everybody does.
AS_USER = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def alive(group: int) -> list[int]:
    """The processes of a group that run, as Linux lists them: one that has ended may stay as a zombie."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


class Processes:
    """Running processes of one program, each the head of a group; at the end of a `with` they are killed.

    each: one more argument for every process. before: a program that runs them, such as AS_USER.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        count: int,
        devices: int,
        folder: Path,
        each: Sequence[str] = (),
        before: Sequence[str] = (),
    ):
        place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", str(count), "--heartbeat=10"]
        place = place if count > 1 else []
        self.files = [folder / f"process_{i}_{time.monotonic_ns()}.log" for i in range(count)]
        self.running = []
        for i, file in enumerate(self.files):
            own = [*place, "--process_id", str(i)] if count > 1 else []
            own += [each[i]] if each else []
            with open(file, "w") as out:
                process = subprocess.Popen(
                    [*before, sys.executable, "-m", *arguments, *own],
                    cwd=ROOT,
                    env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.running.append(process)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def out(self, i: int = 0) -> str:
        """What process i has written, to stdout and stderr."""
        return self.files[i].read_text(errors="replace")

    def wait(self, seconds: float = 180) -> list[int]:
        """The exit codes of all, once they have ended."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.running]

    def until(self, text: str, i: int = 0, seconds: float = 180) -> None:
        """Return when process i has written this; AssertionError if it ends before."""
        deadline = time.monotonic() + seconds
        while text not in self.out(i):
            assert self.running[i].poll() is None, self.out(i)[-3000:]
            assert time.monotonic() < deadline, self.out(i)[-3000:]
            time.sleep(0.05)

    def kill(self) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):  # a group may outlive its head
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
