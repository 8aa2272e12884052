"""Programs of one or several processes on this machine, each with simulated devices, for tools.chaos and tests."""

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
# The default schedule lets simulated devices begin collectives in different orders. On few cores they then wait for
# each other until XLA ends the process.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
# Without these rights root can neither write nor read what permissions forbid, like every other user.
AS_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def alive(group: int) -> list[int]:
    """The running processes of a group, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process ended meanwhile
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


class Processes(contextlib.AbstractContextManager):
    """Running processes of one program, each the head of a group. The end of a `with` kills them.

    each: one more argument for each process. before: the start of the command, such as AS_USER.
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
        place = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}", "--heartbeat=10"]
        self.files = [folder / f"process_{i}_{time.monotonic_ns()}.log" for i in range(count)]
        flags = f"{os.environ.get('XLA_FLAGS', '')} {IN_ORDER}".strip()
        self.running = []
        for i, file in enumerate(self.files):
            own = [*place, f"--process_id={i}"] if count > 1 else []
            own += each[i : i + 1]
            with open(file, "w") as out:
                process = subprocess.Popen(
                    [*before, sys.executable, "-m", *arguments, *own],
                    cwd=ROOT,
                    env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flags},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.running.append(process)

    def __exit__(self, *error: object) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):  # a group may outlive its head
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def out(self, i: int = 0) -> str:
        """The output of process i: stdout and stderr."""
        return self.files[i].read_text(errors="replace")

    def wait(self, seconds: float = 180) -> list[int]:
        """Wait for the end of all; returns their exit codes."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.running]

    def until(self, text: str, i: int = 0, seconds: float = 180) -> None:
        """Wait until process i has written `text`; AssertionError if it ends before."""
        deadline = time.monotonic() + seconds
        while text not in self.out(i):
            assert self.running[i].poll() is None, self.out(i)[-3000:]
            assert time.monotonic() < deadline, self.out(i)[-3000:]
            time.sleep(0.05)
