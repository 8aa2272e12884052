"""The lock of a workdir: one holder, none that a kill leaves for ever, and none that is lost without a word."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diversedit_jax.errors import ConfigError, StorageError
from diversedit_jax.runtime import workdir_lock
from tests import ROOT

SAID = []
OLD = {"host": socket.gethostname(), "pid": 1, "started": "2026-01-01 00:00:00"}  # as older versions wrote it
ABROAD = OLD | {"host": "elsewhere", "kernel": "another", "mount": 1, "token": "a"}


def left_by(folder, holder):
    """A lock that somebody left."""
    path = folder / workdir_lock.FILE
    path.write_text(holder if isinstance(holder, str) else json.dumps(holder))
    return path


def taken_at_once(folder):
    """Whether the lock is had without waiting."""
    begin = time.monotonic()
    with workdir_lock.held(folder, SAID.append, gone=30.0) as check:
        check()
        return time.monotonic() - begin < 10


def test_it_is_held_and_given_back(tmp_path):
    with workdir_lock.held(tmp_path, SAID.append) as check:
        holder = json.loads((tmp_path / workdir_lock.FILE).read_text())
        assert holder["pid"] == os.getpid()
        check()
        with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on "):
            taken_at_once(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), workdir_lock.held(tmp_path, SAID.append):
        raise KeyError
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, pathlib
from diversedit_jax.runtime import workdir_lock
with workdir_lock.held(pathlib.Path(sys.argv[1]), print):
    print("held", flush=True)
    input()
"""


def test_a_running_process_of_this_host_keeps_it_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"is in use by process {other.pid} on .*: wait until it ends"):
            taken_at_once(tmp_path)
        other.kill()
    assert (tmp_path / workdir_lock.FILE).exists()
    assert taken_at_once(tmp_path)


def test_the_lock_of_a_killed_process_does_not_outlive_it_in_a_process_of_its_number(tmp_path):
    with workdir_lock.held(tmp_path, SAID.append):
        killed = json.loads((tmp_path / workdir_lock.FILE).read_text())
    for pid in (1, os.getppid(), os.getpid()):  # all of them run
        left_by(tmp_path, killed | {"pid": pid})
        assert taken_at_once(tmp_path)


@pytest.mark.parametrize(
    "holder", [OLD, ABROAD, ABROAD | {"host": "a\nb" * 1000}, "", "{", '{"host": 1}', "[1]", "[" * 10**5, "\xff\0"]
)
def test_any_other_lock_is_taken_over_when_nobody_touches_it(tmp_path, holder):
    left_by(tmp_path, holder)
    said, begin = [], time.monotonic()
    with workdir_lock.held(tmp_path, said.append, gone=0.2) as check:
        assert time.monotonic() - begin >= 0.2
        check()
    assert len(said) == 1
    assert "\n" not in said[0]
    assert len(said[0]) < 400


def test_without_a_number_of_the_kernel_no_holder_counts_as_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "BOOT", tmp_path / "nowhere")
    left_by(tmp_path, ABROAD | {"kernel": None, "mount": tmp_path.stat().st_dev})
    said = []
    with workdir_lock.held(tmp_path, said.append, gone=0.2):
        assert "waiting" in said[0]


def test_another_host_is_told_apart_by_its_touch(tmp_path):
    said = []
    path = left_by(tmp_path, ABROAD)
    toucher = threading.Timer(0.2, os.utime, [path, (1, 1)])
    toucher.start()
    with (
        pytest.raises(ConfigError, match="is in use by process 1 on elsewhere, since 2026-01-01 00:00:00: wait until"),
        workdir_lock.held(tmp_path, said.append, gone=5.0),
    ):
        pass
    toucher.join()
    assert "was in use by process 1 on elsewhere, since 2026-01-01 00:00:00: waiting 5 s" in said[0]


def test_of_two_hosts_that_take_over_the_last_one_has_it(tmp_path, monkeypatch):
    """Both saw the same lease of a dead holder; the other removes ours and writes its own."""
    left_by(tmp_path, ABROAD)
    create = workdir_lock._created

    def created(folder, text):
        done = create(folder, text)
        if done:
            left_by(tmp_path, ABROAD | {"pid": 7, "token": "b"})
        return done

    monkeypatch.setattr(workdir_lock, "_created", created)
    with (
        pytest.raises(ConfigError, match="is in use by process 7 on elsewhere"),
        workdir_lock.held(tmp_path, SAID.append, gone=0.2),
    ):
        pass
    assert json.loads((tmp_path / workdir_lock.FILE).read_text())["pid"] == 7


def test_the_holder_touches_its_own_lock_and_no_other(tmp_path):
    path = tmp_path / workdir_lock.FILE
    with workdir_lock.held(tmp_path, SAID.append, touched=0.05):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        left_by(tmp_path, ABROAD)
        os.utime(path, (1, 1))
        time.sleep(0.3)
        assert path.stat().st_mtime == 1
    assert path.exists(), "it is that of another host"


def remove_lock(folder):
    (folder / workdir_lock.FILE).unlink()


def take_over(folder):
    left_by(folder, ABROAD)


def move_away(folder):
    folder.rename(folder.with_name("moved"))


def make_anew(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def begin_anew(folder):
    make_anew(folder)
    left_by(folder, ABROAD)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (remove_lock, r"run/\.lock was removed or moved while this run used it: this run ends, and saves nothing more"),
        (take_over, "run was taken over by process 1 on elsewhere, since .*: this run ends, and saves nothing more"),
        (begin_anew, "run was taken over by process 1 on elsewhere"),
        (shutil.rmtree, "run was removed or moved while this run used it"),
        (move_away, "run was removed or moved while this run used it"),
        (make_anew, "run was removed or moved while this run used it"),
    ],
)
def test_a_lock_that_is_lost_says_so(tmp_path, harm, says):
    folder = tmp_path / "run"

    def lose(error):
        folder.mkdir(exist_ok=True)
        with workdir_lock.held(folder, SAID.append, touched=0.05, gone=0.2) as check:
            check()
            harm(folder)
            if error is not None:
                raise error
            check()

    for error in (None, FileNotFoundError("what came of it")):
        with pytest.raises(ConfigError, match=says):
            lose(error)
        shutil.rmtree(tmp_path / "moved", ignore_errors=True)


@pytest.mark.parametrize("path", ["nowhere", "file", "folder"])
def test_what_cannot_be_locked_is_one_line(tmp_path, path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / workdir_lock.FILE).mkdir(parents=True)
    with pytest.raises(StorageError, match=rf"{path} cannot be locked: \w+"), workdir_lock.held(tmp_path / path, print):
        pass


# One process of a race. It waits for a line, tries to take the lock, and says whether it has it. All processes have the
# same host name and pid, as containers can have. "hosts": they do not see each other's flock.
RACER = """
import fcntl, os, pathlib, socket, sys, time
from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import workdir_lock

folder, witness, kind, number = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
os.getpid, socket.gethostname = lambda: 1, lambda: "container"
if kind == "hosts":
    fcntl.flock = lambda folder, operation: None
    workdir_lock._dead = lambda other, mine: False
gone = {"killed": 30.0, "unknown": 0.05, "hosts": 1.0}[kind]
for line in sys.stdin:
    try:
        with workdir_lock.held(folder, lambda line: None, touched=0.02, gone=gone):
            os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
            if line == "stay\\n":
                print("held", flush=True)
                sys.stdin.readline()
            else:
                time.sleep(0.001 * (number % 3))
            witness.unlink()
        print("done" if line == "stay\\n" else "held", flush=True)
    except ConfigError:
        print("refused", flush=True)
    except FileExistsError:
        print("TWO HOLDERS", flush=True)
"""


def race(folder: Path, kind: str, rounds: int, processes: int = 5) -> None:
    """Let processes race for the lock. In every other round the holder stays until all others have been refused.

    kind: killed: no lock, or that of a killed process; unknown: an empty or old one; hosts: none.
    """
    run, witness = folder / "run", folder / "witness"
    run.mkdir()
    with workdir_lock.held(run, SAID.append):
        killed = (run / workdir_lock.FILE).read_text()
    left = {"killed": [killed, None], "unknown": ["", OLD, ABROAD], "hosts": [None]}[kind]
    with contextlib.ExitStack() as stack:
        racers = []
        for i in range(processes):
            command = [sys.executable, "-c", RACER, run, witness, kind, str(i)]
            racer = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            racers.append(stack.enter_context(racer))
            stack.callback(racer.kill)

        def tell(some, line):
            for racer in some:
                racer.stdin.write(line)
                racer.stdin.flush()

        for number in range(rounds):
            if (holder := left[number % len(left)]) is not None:
                left_by(run, holder)
            stay = number // len(left) % 2 == 0 or kind == "hosts"
            tell(racers, "stay\n" if stay else "brief\n")
            said = [racer.stdout.readline().strip() for racer in racers]
            assert set(said) <= {"held", "refused"}, f"round {number}: {said}"
            assert said.count("held") == 1 if stay else "held" in said, f"round {number}: {said}"
            if stay:
                holder = racers[said.index("held")]
                tell([holder], "leave\n")
                assert holder.stdout.readline() == "done\n"
            assert not list(run.iterdir()), f"round {number}"


@pytest.mark.parametrize(("kind", "rounds"), [("killed", 40), ("unknown", 6), ("hosts", 3)])
def test_racing_processes_have_one_holder(tmp_path, kind, rounds):
    race(tmp_path, kind, rounds)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rounds"), [("killed", 3000), ("unknown", 600), ("hosts", 100)])
def test_racing_processes_have_one_holder_in_many_rounds(tmp_path, kind, rounds):
    race(tmp_path, kind, rounds, processes=8)


@pytest.mark.slow
def test_killed_holders_hand_over_at_once(tmp_path):
    """100 times the holder is killed while others ask for the lock."""
    run = tmp_path / "run"
    run.mkdir()
    for _ in range(100):
        command = [sys.executable, "-c", HOLD, run]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on"):
                taken_at_once(run)
            holder.send_signal(signal.SIGKILL)
        assert taken_at_once(run)
