"""Programs as several processes on this machine, each with some simulated devices, which meet at an address."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Processes:
    """Running processes of one program. out: what each has written, stdout and stderr."""

    def __init__(self, arguments: Sequence[str], count: int, devices: int, folder: Path, each: Sequence[str] = ()):
        place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num_processes", str(count), "--heartbeat=10"]
        place = place if count > 1 else []
        self.files = [folder / f"process_{i}_{time.monotonic_ns()}.log" for i in range(count)]
        self.running = []
        for i, file in enumerate(self.files):
            own = [*place, "--process_id", str(i)] if count > 1 else []
            own += [each[i]] if each else []
            with open(file, "w") as out:
                process = subprocess.Popen(
                    [sys.executable, "-m", *arguments, *own],
                    cwd=ROOT,
                    env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.running.append(process)

    def out(self, i: int = 0) -> str:
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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def started(
    arguments: Sequence[str], count: int, devices: int, folder: Path, each: Sequence[str] = ()
) -> Iterator[Processes]:
    """Processes of a program, which are killed at the end. each: one more argument for every process."""
    processes = Processes(arguments, count, devices, folder, each)
    try:
        yield processes
    finally:
        processes.kill()
