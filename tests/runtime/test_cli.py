"""A program goes on and saves, whatever becomes of its output, and when it is stopped and continued."""

import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import cli
from tests import ROOT

# A program that prints a lot, asks whether to stop, and leaves a file when it has saved. Its argument: that file.
PROGRAM = """
import pathlib, sys, time
from diversedit_jax.runtime import cli, progress

def main(arguments):
    shown = progress.Progress(1000, 0, 1, "images")
    with shown, cli.stop_requests(shown.note) as stop, cli.watchdog(2) as alive:
        for step in range(1, 1001):
            alive()
            print("result", step, "x" * 100)
            shown.report(step, {"loss": 1.0})
            time.sleep(0.002)
            if step == 30:
                print("ready", flush=True)
            if stop():
                break
    pathlib.Path(arguments[0]).write_text(f"{step} {stop()}")
    if stop():
        raise cli.Stopped("saved")

cli.launch(main, arguments=True)
"""


def program(saved, sinks: str = "") -> list[str]:
    """The command of the program. sinks: how the shell redirects its output."""
    return ["bash", "-c", f'exec "$@" {sinks}', "bash", sys.executable, "-c", PROGRAM, str(saved)]


def run(saved, sinks: str) -> subprocess.CompletedProcess:
    return subprocess.run(program(saved, sinks), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("sinks", ["2>/dev/full", ">/dev/full", ">&- 2>&- <&-"])
def test_output_that_cannot_be_written_ends_nothing(tmp_path, sinks):
    done = run(tmp_path / "saved", sinks)
    assert done.returncode == 0, done.stderr[-500:]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert (tmp_path / "saved").read_text() == "1000 None"


def started(saved) -> subprocess.Popen:
    """The program, when it has printed for a while; its stdout and stderr are one pipe."""
    process = subprocess.Popen(
        program(saved), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line == "ready\n":
            return process
    raise AssertionError(f"the program ended with {process.wait()}")


def test_a_closed_pipe_is_no_error(tmp_path):
    """As in `program | head`."""
    process = started(tmp_path / "saved")
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "saved").read_text() == "1000 None"


def test_a_program_saves_when_its_log_dies_first(tmp_path):
    """As Ctrl-C in `program 2>&1 | tee log`: tee ends, and the program's next word meets a broken pipe."""
    process = started(tmp_path / "saved")
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 42
    step, name = (tmp_path / "saved").read_text().split()
    assert int(step) < 1000
    assert name == "SIGINT"


def test_a_signal_in_the_middle_of_a_print_is_a_request(tmp_path):
    """Python forbids to print there: the notice is lost, the request is not."""
    code = """
import io, os, signal
from diversedit_jax.runtime import cli

class Reentrant(io.StringIO):
    def write(self, text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

with cli.stop_requests(lambda text: print(text, file=Reentrant())) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n"), done.stderr


def test_a_bucket_is_refused_where_a_flag_names_a_path(monkeypatch):
    values = flags.FlagValues()
    for name in ("workdir", "config.note"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    says = r"^--workdir: gs://bucket/x is not a path of this machine: mount the bucket \(gcsfuse\) or copy it$"
    with pytest.raises(ConfigError, match=says):
        cli.parse(["program", "--workdir=gs://bucket/x"])
    assert cli.parse(["program", "--workdir=/bucket/x", "--config.note=see https://example.com"]) == []


def test_what_the_machine_refuses_ends_a_program_in_one_line():
    fault = "jax.numpy.zeros(2**44).block_until_ready()"
    program = f"import jax\nfrom diversedit_jax.runtime import cli\n\ndef main():\n    {fault}\n\ncli.launch(main)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 71, done.stderr
    assert done.stderr.startswith("error: the memory of a device does not suffice (RESOURCE_E")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), 71, "the machine lacks memory, threads or open files: MemoryError"),
        (RuntimeError("can't start new thread"), 71, "the machine lacks memory, threads or open files"),
        (OSError(24, "Too many open files", "a.npy"), 71, "the machine lacks memory, threads or open files"),
        (OSError(28, "No space left on device", "a.npy"), 74, "cannot write a.npy: No space left on device"),
        (NotADirectoryError(20, "Not a directory", "/dev/null/x"), 74, "/dev/null/x: Not a directory"),
    ],
)
def test_what_the_machine_refuses_is_told_from_a_fault(error, code, says):
    told = cli.of_machine(error)
    assert told.exit_code == code
    assert str(told).startswith(says)
    assert "\n" not in str(told)


def test_ctrl_z_for_longer_than_the_watchdog_is_no_hang(tmp_path):
    process = started(tmp_path / "saved")
    try:
        process.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        time.sleep(4)  # the watchdog waits 2 s
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    assert (tmp_path / "saved").read_text() == "1000 None"


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise cli.Stopped('saved')", 42)])
def test_a_signal_while_python_ends_does_not_change_the_exit_code(end, code):
    """A launcher would start a finished program again."""
    late = "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))"
    program = (
        f"import atexit, os, signal\nfrom diversedit_jax.runtime import cli\n\n{late}\n\ndef main():\n    {end}\n\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program}cli.launch(main)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr


TALKS = """
import time
from diversedit_jax.runtime import cli, progress

def main():
    progress.say("a note")
    with progress.Progress(2, 0, 1, "images") as shown, progress.Ticker(2, "images") as ticker:
        for step in (1, 2):
            shown.report(step, {"loss": 1.0})
            ticker.update(1)
    progress.done(61, {"samples": "somewhere.npz", "grid": "else.png"}, "2 samples")

cli.launch(main)
"""


@pytest.mark.parametrize("arguments", [[], ["--quiet"]])
def test_a_quiet_program_prints_its_results_alone(arguments):
    command = [sys.executable, "-c", TALKS, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "2 samples in 1m01s\n  samples  somewhere.npz\n  grid     else.png\n"
    if arguments:
        assert done.stderr == ""
    else:
        assert done.stderr.splitlines()[0] == "a note"
        assert "step 2/2" in done.stderr
