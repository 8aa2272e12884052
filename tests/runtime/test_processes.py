"""Several processes are one program: they agree, stop together, fail together, and train what one process trains."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import processes
from diversedit_jax.training.checkpoint import Checkpoints
from tests import untrained
from tools.chaos.processes import Processes, alive

CONFIG = """
from ml_collections import ConfigDict
from diversedit_jax.configs import digits

def get_config():
    config = digits.get_config()
    config.update({"total_steps": 8, "batch_size": 16, "log_every": 1})
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.checkpoint.update({"every": 2, "keep": 9})
    config.samples.update({"every": 0, "num": 10})
    config.sampler.update({"solver": "euler", "steps": 1, "batch_size": 16})
    config.evaluators.digits.num = 20
    config.evaluators.scores.num = 110
    if not EVALUATORS:
        config.evaluators = ConfigDict()
    return config
"""


def training(workdir: Path, *flags: str, evaluators: bool = False, first: str = "") -> list[str]:
    """A small run of the digits. first: what its config file, a program, does before anything else."""
    file = workdir.parent / f"{workdir.name}_config" / "small.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(first + CONFIG.replace("EVALUATORS", str(evaluators)))
    return ["diversedit_jax.train", f"--config={file}", f"--workdir={workdir}", *flags]


def checksums(workdir: Path, step: int = 8) -> dict[str, int]:
    """Those of every array of a checkpoint, as stored and verified when it is read."""
    record = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return record["body"]["checksums"]


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("two")
    with Processes(training(workdir), 2, 4, workdir) as run:
        assert run.wait() == [0, 0], run.out(0) + run.out(1)
        assert "waiting for 2 processes at 127.0.0.1:" in run.out(0)
        assert "8 x cpu (cpu)" in run.out(0)
        assert "step" not in run.out(1).replace("stepped", ""), "the second process has nothing to say"
    assert (workdir / "samples.png").exists()
    return workdir


def stop(workdir: Path, asked: int) -> None:
    """Start a run of two processes and send SIGTERM to one: both save, and end at the same step."""
    with Processes(training(workdir), 2, 4, workdir) as run:
        run.until("step 3/8")
        os.kill(run.running[asked].pid, signal.SIGTERM)
        assert run.wait() == [42, 42], run.out(0) + run.out(1)
        said = "SIGTERM: stopped at step "
        assert run.out(0).partition(said)[2][:1] == run.out(1).partition(said)[2][:1] != ""


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_step(tmp_path):
    stop(tmp_path, asked=1)
    assert Checkpoints(tmp_path / "checkpoints").latest() >= 3


@pytest.mark.slow
@pytest.mark.parametrize("asked", [1, 0])
def test_stopped_and_resumed_is_the_same_to_the_bit(straight, tmp_path, asked):
    """The same command goes on."""
    stop(tmp_path, asked)
    with Processes(training(tmp_path), 2, 4, tmp_path) as run:
        assert run.wait() == [0, 0], run.out(0) + run.out(1)
        assert "resuming from step" in run.out(0)
    assert checksums(tmp_path) == checksums(straight)
    assert losses(tmp_path) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_killed_ends_the_other_and_nothing_is_lost(straight, tmp_path, killed):
    with Processes(training(tmp_path), 2, 4, tmp_path) as run:
        run.until("step 5/8")
        os.kill(run.running[killed].pid, signal.SIGKILL)
        codes = run.wait(30)
        assert codes[killed] == -signal.SIGKILL
        assert codes[1 - killed] not in (0, 42)
    assert Checkpoints(tmp_path / "checkpoints").latest() in (2, 4)
    with Processes(training(tmp_path), 2, 4, tmp_path) as run:
        assert run.wait() == [0, 0], run.out(0) + run.out(1)
    assert checksums(tmp_path) == checksums(straight)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 8), (4, 2), (1, 1)])
def test_another_number_of_processes_goes_on(straight, tmp_path, count, devices):
    """The same batches; the same numbers up to the order of sums, and to the bit on a layout that sums alike."""
    with Processes(training(tmp_path, "--config.total_steps=4"), 2, 4, tmp_path) as run:
        assert run.wait() == [0, 0], run.out(0) + run.out(1)
    with Processes(training(tmp_path), count, devices, tmp_path) as run:
        assert run.wait() == [0] * count, run.out(0)
        assert "resuming from step 4 of 8" in run.out(0)
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=1e-4)
    if (count, devices) == (4, 2):
        assert checksums(tmp_path) == checksums(straight)


@pytest.mark.slow
def test_evaluators_judge_on_several_processes(tmp_path):
    with Processes(training(tmp_path, evaluators=True), 2, 4, tmp_path) as run:
        assert run.wait() == [0, 0], run.out(0) + run.out(1)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("scores/fd_digits" in line for line in found)
    assert any("digits/accuracy" in line for line in found)


@pytest.mark.slow
def test_damage_that_one_process_sees_sets_the_step_aside_for_all(tmp_path):
    """Parameters are split, so that each process reads other parts of the files; what the second reads is cut off."""
    flags = ["--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.model.width=64"]
    with Processes(training(tmp_path, *flags, "--config.total_steps=4"), 2, 4, tmp_path) as run:
        assert run.wait() == [0, 0], run.out(0) + run.out(1)
    own = sorted((tmp_path / "checkpoints" / "4" / "state").glob("ocdbt.process_1/**/*"), key=os.path.getsize)
    own[-1].write_bytes(own[-1].read_bytes()[:100])
    with Processes(training(tmp_path, *flags), 2, 4, tmp_path) as run:
        assert run.wait() == [0, 0], run.out(0) + run.out(1)
        assert "it is set aside as 4.damaged-" in run.out(0)
        assert "resuming from step 2 of 8" in run.out(0)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("each", "messages"),
    [
        (
            ["--config.optim.learning_rate=0.001", "--config.optim.learning_rate=0.002"],
            ["config: optim.learning_rate is 0.001 on process 0 and 0.002 on process 1: all processes need the same"]
            * 2,
        ),
        pytest.param(
            ["--workdir={tmp}/a", "--workdir={tmp}/b"],
            ["is not shared: process 0 wrote a file there that process 1 did not see"] * 2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_do_not_agree_stop_at_once(tmp_path, each, messages):
    each = [flag.format(tmp=tmp_path) for flag in each]
    soon = "from diversedit_jax.runtime import processes\nprocesses.SEEN = 3\n"  # not the minute of a slow mount
    with Processes(training(tmp_path / "run", first=soon), 2, 1, tmp_path, each) as run:
        codes = run.wait(60)
    assert 78 in codes
    assert all(code != 0 for code in codes)
    for i, message in enumerate(messages):
        assert message in run.out(i) or codes[i] != 78
    assert any(message in run.out(i) for i, message in enumerate(messages))
    assert not list(tmp_path.rglob("config.json"))


def test_a_directory_that_is_not_shared_is_refused_in_time(tmp_path, monkeypatch):
    """As the second of two processes sees it; the first says that it does."""
    monkeypatch.setattr(processes, "SEEN", 0.1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes, "broadcast_one_to_all", lambda x: x)
    monkeypatch.setattr(processes, "process_allgather", lambda seen: np.array([1, seen]))
    with pytest.raises(ConfigError, match=r"is not shared: .* that process 1 did not see in 0.1 s") as error:
        processes.check_shared(tmp_path)
    assert error.value.exit_code == 78


@pytest.mark.slow
def test_one_that_hangs_ends_all_with_their_stacks(tmp_path):
    """The second reads a record that never comes, the first waits for it in the step; both say where they stand."""
    hang = ["--config.watchdog=8", "--config.data.name=tests.test_train:make_sleeping", "--config.input.num_threads=0"]
    with Processes(training(tmp_path, *hang, "--config.total_steps=50"), 2, 1, tmp_path) as run:
        codes = run.wait()
        outs = [run.out(i) for i in range(2)]
    assert all("Timeout (0:00:08)!" in out for out in outs), outs
    hung = ['test_train.py", line' in out for out in outs]
    assert hung == [False, True], "the stacks say which of them hangs in the data"
    # The alarms of both are due at once; one that has not ended by its own is ended for the other's loss.
    assert -signal.SIGALRM in codes, codes  # 142 in a shell
    assert set(codes) <= {-signal.SIGALRM, -signal.SIGABRT}, codes


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed(tmp_path):
    with Processes(
        training(tmp_path, "--config.input.num_workers=2", "--config.total_steps=100000"), 1, 1, tmp_path
    ) as run:
        (trainer,) = run.running
        run.until(" 1/100000")
        assert len(alive(trainer.pid)) >= 3, "the trainer and its workers"
        trainer.kill()
        trainer.wait()
        deadline = time.monotonic() + 5
        while left := alive(trainer.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@pytest.mark.slow
def test_a_second_run_in_a_workdir_is_refused_until_the_first_is_gone(tmp_path):
    endless = training(tmp_path, "--config.total_steps=100000")
    with Processes(endless, 1, 1, tmp_path) as first:
        first.until(" 5/100000")
        with Processes(endless, 1, 1, tmp_path) as second:
            assert second.wait() == [78]
            (line,) = second.out().splitlines()
            assert f"{tmp_path} is in use by process {first.running[0].pid} on " in line
        assert first.running[0].poll() is None, "the first goes on"
    with Processes(endless, 1, 1, tmp_path) as third:  # the first was killed, and its lock is there
        assert (tmp_path / ".lock").exists()
        third.until("resuming from step", seconds=30)


def test_flags_that_do_not_go_together_are_refused():
    class Flag:
        def __init__(self, value):
            self.value = value

    class Given(dict):
        heartbeat = 10

    def start(coordinator=None, num_processes=None, process_id=None):
        options = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
        processes.start(Given({name: Flag(value) for name, value in options.items()}))

    with pytest.raises(ConfigError, match=r"go together: give --num_processes too"):
        start(coordinator="here:1")
    with pytest.raises(ConfigError, match=r"--process_id = 2: must be at least 0 and at most 1"):
        start("here:1", 2, 2)
    start()  # alone: nothing happens
    assert processes.cluster() is None
    processes.agree("config", {"a": 1})
    assert processes.number_of_first(3) == 3
    assert processes.first_alone(lambda: 4) == 4


def test_clusters_are_known_by_their_marks(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert processes.cluster() is None, "a shell on a node of an allocation is no task"
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.cluster() == "4 SLURM tasks"
    monkeypatch.delenv("SLURM_NTASKS")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert processes.cluster() == "2 Open MPI processes"


@pytest.mark.slow
def test_restores_of_the_parameters_are_numbers(straight):
    """What the runs above compare is not empty."""
    assert len(checksums(straight)) > 50
    assert np.isfinite(list(losses(straight).values())).all()


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """A run with random weights, and what sampling, evaluation and analysis of one process say of it."""
    workdir = tmp_path_factory.mktemp("looked_at") / "run"
    workdir.mkdir()
    config = digits.get_config()
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.mesh.fsdp = 2
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 16})
    untrained.leave(workdir, config, {1: ["params", "ema"]}, scale=0.02)
    alone = workdir.parent / "alone"
    alone.mkdir()
    for program, flags in LOOKS.items():
        with Processes(look(program, workdir, alone, flags), 1, 8, alone) as run:
            assert run.wait() == [0], run.out()
    return workdir, alone


LOOKS = {
    "sample": ["--num=20"],
    "evaluate": ["--num=110"],
    "analyze": ["--num=32", "--batch=16", "--times=0.1"],
}


def look(program: str, workdir: Path, out: Path, flags: list[str]) -> list[str]:
    return [f"diversedit_jax.{program}", f"--workdir={workdir}", f"--out={out / program}", *flags]


@pytest.mark.slow
@pytest.mark.parametrize("program", list(LOOKS))
def test_several_processes_look_at_a_run_as_one_does(looked_at, tmp_path, program):
    """The same numbers, written by the first alone."""
    workdir, alone = looked_at
    with Processes(look(program, workdir, tmp_path, LOOKS[program]), 2, 4, tmp_path) as run:
        assert run.wait() == [0, 0], run.out(0) + run.out(1)
        assert str(tmp_path / program) in run.out(0)
        assert str(tmp_path / program) not in run.out(1)
    theirs, ours = alone / program, tmp_path / program
    assert sorted(file.name for file in ours.rglob("*")) == sorted(file.name for file in theirs.rglob("*"))
    if program == "sample":
        with np.load(ours / "samples.npz") as found, np.load(theirs / "samples.npz") as wanted:
            # a level of 256 at most, where a sum in another order rounds to the other side
            assert np.abs(found["arr_0"].astype(int) - wanted["arr_0"]).max() <= 1
    elif program == "evaluate":
        found, wanted = (json.loads((folder / "scores.json").read_text())["scores"] for folder in (ours, theirs))
        assert found == pytest.approx(wanted, rel=1e-3)
    else:
        for file in theirs.glob("*.csv"):
            assert_close_tables(ours / file.name, file)


def assert_close_tables(found: Path, wanted: Path) -> None:
    """Two CSV files with the same words and nearly the same numbers."""
    tables = [list(csv.reader(file.read_text().splitlines())) for file in (found, wanted)]
    for ours, theirs in zip(*tables, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            try:
                number = float(b)
            except ValueError:
                assert a == b, f"{found.name}: {a} for {b}"
            else:
                assert float(a) == pytest.approx(number, rel=1e-3, abs=1e-4, nan_ok=True), found.name
