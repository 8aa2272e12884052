"""A run as its user sees it: it trains, stops, resumes to the same bits, and refuses what cannot work."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diversedit_jax import sample, train
from diversedit_jax.analysis import run_report
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import default, digits
from diversedit_jax.data import Dataset
from diversedit_jax.data import digits as digits_data
from diversedit_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from diversedit_jax.runs import trained
from diversedit_jax.runtime import cli, loggers, workdir_lock
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.weights import dit as releases
from tests import ROOT
from tests.data import test_image_collections
from tests.data.test_latents import write
from tests.parts import logged
from tests.runtime.test_metric_writer import events_of
from tests.runtime.test_profiler import steps_in
from tools.chaos.processes import AS_USER, Processes


def tiny(**changes):
    """The digits config with a model that trains in seconds; `changes` by dotted key."""
    config = digits.get_config()
    config.update({"total_steps": 6, "batch_size": 16, "log_every": 1})
    config.model.update({"depth": 4, "width": 16, "heads": 2})
    config.checkpoint.update({"every": 2})
    config.samples.update({"every": 0, "num": 0})
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 16})
    config.evaluators = ConfigDict()
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def small(workdir: Path, change: str = "") -> list[str]:
    """The run of tiny() as a program. change: lines of its config file."""
    file = workdir.parent / f"{workdir.name}_config" / "small.py"
    file.parent.mkdir(exist_ok=True)
    body = textwrap.indent(textwrap.dedent(change), "    ")
    file.write_text(
        f"from diversedit_jax.config import slot\nfrom tests.test_train import tiny\n\n\n"
        f"def get_config():\n    config = tiny()\n{body}\n    return config\n"
    )
    return ["diversedit_jax.train", f"--config={file}", f"--workdir={workdir}"]


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> dict[int, float]:
    return {record["step"]: record["loss/total"] for record in records(workdir) if "loss/total" in record}


def source_of(workdir: Path, step: int | None = None, weak_step: int | None = None, **overrides) -> trained.Source:
    """A run, ready to draw samples. overrides: of its sampler's options."""
    return trained.drawing(trained.of_run(workdir), step, weak_step, overrides)


def assert_same_bits(found, expected):
    def compare(path, a, b):
        same = a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)
        assert same, f"{jax.tree_util.keystr(path)} differs"

    jax.tree_util.tree_map_with_path(compare, found, expected)


def assert_resumed_to_the_bit(make: Callable[[], ConfigDict], straight, folder: Path) -> None:
    """A run of 4 steps that is stopped after 3 and resumed is the undisturbed one: `straight`, (workdir, state)."""
    config = make()
    config.evaluators.stop = slot("evaluators", "tests.parts:make_terminate", marker=str(folder / "stopped"))
    config.evaluators.stop.every = 3
    with pytest.raises(cli.Stopped, match="stopped at step 3 of 4"):
        train.run(config, folder / "run")
    assert_same_bits(train.run(make(), folder / "run"), straight[1])
    assert losses(folder / "run") == losses(straight[0])


def assert_one_device_is_as_eight(call: str, straight, folder: Path) -> None:
    """A process with one device trains as the undisturbed run did. call: makes its config, `module.name(arguments)`."""
    file = folder / "config.py"
    file.write_text(f"import {call.rpartition('.')[0]}\n\n\ndef get_config():\n    return {call}\n")
    command = ["diversedit_jax.train", f"--config={file}", f"--workdir={folder / 'run'}"]
    with Processes(command, 1, 1, folder) as run:
        assert run.wait() == [0], run.out()
    assert losses(folder / "run") == pytest.approx(losses(straight[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("decay", "steps", "told"),
    [
        (0.9999, 60, "ema_decay = 0.9999 over 60 steps: .* keeps 99% of its start; .* --config.ema_decay=0.92"),
        (0.9999, 400_000, None),
        (0.92, 60, None),
        (0.9, 1, "keeps 90% of its start; .* --config.ema_decay=0$"),
        (0.0, 1, None),
    ],
)
def test_an_average_that_hardly_moves_is_told(decay, steps, told):
    said = train.slow_average(decay, steps)
    assert said is None if told is None else re.search(told, said), said


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing disturbed: its config, directory and final state."""
    workdir = tmp_path_factory.mktemp("straight")
    config = tiny(profile="4:5", samples__num=10)
    return config, workdir, train.run(config, workdir)


def test_a_run_leaves_what_it_says(straight, capfd, monkeypatch):
    config, workdir, state = straight
    assert int(state["step"]) == 6
    assert json.loads((workdir / "config.json").read_text())["losses"]["diversity"]["preset"] == "release"
    assert json.loads((workdir / "versions.json").read_text())["jax"] == jax.__version__
    assert "merges/linear/kernel" in (workdir / "parameters.txt").read_text()
    assert list(workdir.glob("events.out.tfevents*"))
    assert Checkpoints(workdir / "checkpoints").steps() == [2, 4, 6]
    wanted = {"loss/total", "loss/objective", "loss/diversity", "grad_norm", "learning_rate"} | {
        f"diversity/{part}" for part in ("orthogonality", "mutual_information", "dispersion", "loss", "weight")
    }
    for record in records(workdir):
        assert wanted <= record.keys(), f"step {record['step']} lacks {wanted - record.keys()}"
        parts = sum(record[f"loss/{term}"] for term in ("objective", "diversity"))
        assert record["loss/total"] == pytest.approx(parts, rel=1e-6)
    assert all(record["tflops_per_device"] > 0 for record in records(workdir) if "steps_per_sec" in record)
    assert steps_in(workdir) == {4, 5}
    with Image.open(workdir / "curves.png") as curves:
        assert curves.width == 1400
    assert "<dd>6 of 6</dd>" in (workdir / "report.html").read_text()
    capfd.readouterr()
    monkeypatch.setattr(run_report, "draw", lambda *given: 1 / 0)
    train.run(config, workdir)
    out, err = capfd.readouterr()
    assert "nothing to do: the checkpoint is at step 6" in err
    assert "no report: ZeroDivisionError: division by zero" in err, "it is noted, and the run ends well"
    assert "compiled" not in err
    for name in ("samples.png", "curves.png", "report.html", "metrics.jsonl", "checkpoints/6"):
        assert str(workdir / name) in out


@pytest.mark.slow  # by default those that stop and resume show it
def test_the_same_run_twice_is_the_same_to_the_bit(straight, tmp_path):
    assert_same_bits(train.run(tiny(), tmp_path), straight[2])
    assert losses(tmp_path) == losses(straight[1])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_other_numbers_of_devices_train_alike(straight, tmp_path, devices):
    """On 1, 4 and 8: the same start, data and noise; sums in another order."""
    with Processes(small(tmp_path), 1, devices, tmp_path) as run:
        assert run.wait() == [0], run.out()
    assert losses(tmp_path) == pytest.approx(losses(straight[1]), rel=1e-5)


def drawn(workdir: Path) -> dict[int, float]:
    return {record["step"]: record["stop/drawn"] for record in records(workdir) if "stop/drawn" in record}


def test_stopped_and_resumed_equals_straight_to_the_bit(straight, tmp_path, capfd, monkeypatch):
    """One logger goes on in its run; another, which is switched on later, gets what is new."""
    early, late = logged(monkeypatch, "wandb"), logged(monkeypatch, "mlflow")
    config = tiny(loggers="wandb")
    config.evaluators.stop = slot("evaluators", "tests.parts:make_terminate", marker=str(tmp_path / "stopped"))
    config.evaluators.stop.every = 3
    workdir = tmp_path / "run"
    with pytest.raises(cli.Stopped, match=r"SIGTERM: stopped at step 3 of 6, saved"):
        train.run(config, workdir)
    assert Checkpoints(workdir / "checkpoints").steps() == [2, 3]
    assert not drawn(workdir), "the run saved first, and did not wait for the evaluator"
    assert "<dd>3 of 6</dd>" in (workdir / "report.html").read_text()
    config.loggers = "wandb,mlflow"
    state = train.run(config, workdir)
    assert "resuming from step 3 of 6" in capfd.readouterr().err
    assert drawn(workdir) == {3: 48, 6: 48}
    assert_same_bits(state, straight[2])
    assert losses(workdir) == losses(straight[1])
    (first, second), (other,) = early.made, late.made
    assert [(one.known, one.end) for one in (first, second, other)] == [
        (None, loggers.STOPPED),
        (first.id, loggers.FINISHED),
        (None, loggers.FINISHED),
    ]
    assert [step for step, values in first.written if "loss/total" in values] == [1, 2, 3]
    assert [step for step, _ in second.written] == [3, 4, 5, 6, 6], "the evaluator's, the losses, the evaluator's"
    assert other.written == second.written


@pytest.mark.slow
def test_the_best_checkpoints_are_kept(tmp_path, capsys):
    """Values 3, 1, 2 at steps 2, 4, 6. The newest step is always kept."""
    config = tiny(checkpoint__every=0)
    config.checkpoint.update({"keep": 1, "keep_every": 0, "best": 1, "metric": "rated/value"})
    config.evaluators.rated = slot("evaluators", "tests.parts:make_rated", values=(3.0, 1.0, 2.0))
    config.evaluators.rated.every = 2
    config.evaluators.pictured = slot("evaluators", "tests.parts:make_pictured", side=5)
    train.run(config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 6]
    assert f"best         {tmp_path / 'checkpoints' / '4'}" in capsys.readouterr().out
    assert {record["step"]: record["rated/value"] for record in records(tmp_path) if "rated/value" in record} == {
        2: 3.0,
        4: 1.0,
        6: 2.0,
    }
    (count,) = (record["pictured/parameters"] for record in records(tmp_path) if "pictured/parameters" in record)
    assert count > 1000
    (picture,) = events_of(tmp_path).Images("pictured/picture")
    assert (picture.step, picture.width, picture.height) == (6, 5, 5)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (None, r"metric = None: must be LABEL/NAME of config.evaluators, known: rated"),
        ("fid", r"metric = 'fid': must be LABEL/NAME of config.evaluators, known: rated"),
        pytest.param(
            "rated/fid", r"metric = 'rated/fid' is not found; did you mean 'rated/value'", marks=pytest.mark.slow
        ),
    ],
)
def test_a_metric_that_is_not_there_keeps_nothing(metric, message, tmp_path):
    config = tiny(total_steps=2)
    config.checkpoint.update({"best": 2, "metric": metric})
    config.evaluators.rated = slot("evaluators", "tests.parts:make_rated", values=(3.0,))
    config.evaluators.rated.every = 1
    with pytest.raises(ConfigError, match=message):
        train.run(config, tmp_path)


def test_another_config_is_refused_by_key_and_longer_runs_are_not(straight, tmp_path):
    _, workdir, _ = straight
    for change, key in [
        ({"optim__learning_rate": 1e-3}, "optim.learning_rate: 0.002 there, 0.001 given"),
        ({"seed": 1}, "seed: 0 there, 1 given"),
        ({"batch_size": 32}, "batch_size: 16 there, 32 given"),
    ]:
        with pytest.raises(ConfigError, match=key):
            train.run(tiny(**change), workdir)
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["seed"] == 0, "a refused config was stored"


@pytest.mark.slow
def test_a_longer_run_continues(tmp_path, capfd):
    """Also if it was stopped at its end, before its scores and pictures: those of the shorter run do not count."""
    marker, workdir = tmp_path / "stopped", tmp_path / "a"

    def config(total_steps):
        made = tiny(total_steps=total_steps, optim__decay="constant", samples__num=4, ema_decay=0.5)
        made.evaluators.stop = slot("evaluators", "tests.parts:make_terminate", marker=str(marker))
        return made

    marker.touch()
    train.run(config(3), workdir)
    picture = (workdir / "samples.png").read_bytes()
    marker.unlink()
    with pytest.raises(cli.Stopped, match="stopped at step 5 of 5, saved"):
        train.run(config(5), workdir)
    assert drawn(workdir) == {3: 48}
    resumed = train.run(config(5), workdir)
    assert drawn(workdir) == {3: 48, 5: 48}
    assert (workdir / "samples.png").read_bytes() == (workdir / "samples" / "0000005.png").read_bytes() != picture
    assert (workdir / "samples" / "0000003.png").read_bytes() == picture
    capfd.readouterr()
    train.run(config(5), workdir)
    assert "nothing to do: the checkpoint is at step 5" in capfd.readouterr().err
    assert drawn(workdir) == {3: 48, 5: 48}
    assert_same_bits(resumed, train.run(config(5), tmp_path / "b"))


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [0, 3])
def test_data_of_any_number_of_classes_train_and_are_sampled(num_classes, tmp_path):
    config = tiny(total_steps=2, checkpoint__every=0, sampler__cfg_scale=1.0 if num_classes == 0 else 1.5)
    config.data = slot("data", "synthetic", shape=(8, 8, 1), num_classes=num_classes, size=64)
    state = train.run(config, tmp_path)
    assert state["params"]["label_embed"]["embedding"].shape == (num_classes + 1, 16)
    source = source_of(tmp_path)
    with np.load(sample.run(source, num=4) / "samples.npz") as found:
        np.testing.assert_array_equal(found["labels"], [0, 0, 0, 0] if num_classes == 0 else [0, 1, 2, 0])
    with pytest.raises(ConfigError, match=rf"labels must be in 0 .. {max(num_classes - 1, 0)}, given 3"):
        sample.run(source, labels=[3])
    if num_classes == 0:
        with pytest.raises(ConfigError, match=r"cfg_scale = 2.0: must be 1, because the data have no classes"):
            sample.run(source_of(tmp_path, cfg_scale=2.0))
        config.sampler.cfg_scale = 1.5
        with pytest.raises(ConfigError, match=r"cfg_scale = 1.5: must be 1, because the data have no classes"):
            train.run(config, tmp_path / "guided")


@pytest.mark.slow
def test_records_that_cannot_be_read_are_replaced_when_the_config_says_so(tmp_path, capfd):
    config = tiny(total_steps=2, checkpoint__every=0)
    config.data = ConfigDict({"name": "tests.test_train:make_partly_damaged"})
    with pytest.raises(DataError, match="record 5: ValueError: damaged"):
        train.run(config, tmp_path / "strict")
    config.input.max_bad_records = 1
    train.run(config, tmp_path / "lenient")
    assert "data: replaced record 5: ValueError: damaged (1 of at most 1)" in capfd.readouterr().err
    assert records(tmp_path / "lenient")[0]["data/bad_records"] == 1


class PartlyDamaged:
    """Sixteen images, one of which cannot be read."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        if index == 5:
            raise ValueError("damaged")
        return {"x": np.full((8, 8, 1), index / 16, np.float32), "y": index % 3}


def make_partly_damaged(split):
    return Dataset(PartlyDamaged(), None, Space((8, 8, 1), Conditions.labels(3)))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_by_name(tmp_path):
    config = tiny()
    config.losses.bad = slot("losses", "tests.parts:make_poisoned", at=4)
    with pytest.raises(NonFiniteError, match=r"loss/bad is nan at step 4; nothing of it was saved, .* is step 2"):
        train.run(config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]
    assert max(losses(tmp_path)) == 3


@pytest.mark.slow
def test_batches_are_skipped_as_often_as_the_config_allows(tmp_path, capfd):
    """Counted over a resume, too: two are allowed, and the third ends the run."""

    def config(total_steps):
        made = tiny(max_skipped=2, total_steps=total_steps, checkpoint__every=2)
        made.losses.bad = slot("losses", "tests.parts:make_poisoned", at=2, last=4)
        return made

    train.run(config(3), tmp_path)
    said = capfd.readouterr().err
    assert "loss/bad is nan at step 2: the batch is skipped (1 of at most 2)" in said
    assert "loss/bad is nan at step 3: the batch is skipped (2 of at most 2)" in said
    counts = {record["step"]: record["skipped_batches"] for record in records(tmp_path) if "loss/bad" in record}
    assert counts == {1: 0, 2: 1, 3: 2}
    assert [Checkpoints(tmp_path / "checkpoints").meta(step)["skipped"] for step in (2, 3)] == [1, 2]
    with pytest.raises(NonFiniteError, match=r"loss/bad is nan at step 4 \(more than max_skipped = 2\); .* is step 3"):
        train.run(config(6), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "every", "message"),
    [
        (
            60_000,
            2,
            r"error: checkpoint .*/checkpoints/\d could not be written \(.*File too large.*\)\. Whole .*",
        ),
        (1_000, 0, r"error: cannot write a file: File too large\. Whole .* when there is space"),
    ],
    ids=["at a checkpoint", "at a metric"],
)
def test_a_disk_that_fills_ends_the_run_in_one_line_and_it_resumes(straight, tmp_path, limit, every, message):
    full = f"""
        config.checkpoint.every = {every}
        config.evaluators.full = slot("evaluators", "tests.parts:make_full", limit={limit})
        config.evaluators.full.every = 3
    """
    workdir = tmp_path / "run"
    done = program_of(small(workdir, full))
    assert done.returncode == 74, done.stderr
    assert "step 3/6" in done.stderr
    assert [line for line in done.stderr.splitlines() if re.fullmatch(message, line)] == [done.stderr.splitlines()[-1]]
    assert "Traceback" not in done.stderr
    assert set(Checkpoints(workdir / "checkpoints").steps()) <= {2}
    assert_same_bits(train.run(tiny(), workdir), straight[2])
    assert losses(workdir) == losses(straight[1])
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.skipif(AS_USER != [] and shutil.which(AS_USER[0]) is None, reason="root may write anywhere")
@pytest.mark.parametrize(
    ("place", "code", "message"),
    [
        ("checkpoints", 74, "could not be written (PermissionError"),
        (".", 78, "cannot be written: Permission denied"),
        ("checkpoints/4", 74, "checkpoints/4 cannot be read (PermissionError"),
        ("checkpoints/4/meta/metadata", 74, "checkpoints/4 cannot be read (PermissionError"),
        ("metrics.jsonl", 74, "metrics.jsonl: Permission denied"),
        ("config.json", 74, "config.json: Permission denied"),
    ],
)
def test_a_place_without_permission_ends_the_run_in_one_line_and_it_resumes(straight, tmp_path, place, code, message):
    workdir = Path(shutil.copytree(straight[1], tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "6")
    before = (workdir / place).stat().st_mode
    (workdir / place).chmod(0o555 if place in ("checkpoints", ".") else 0)
    try:
        done = program_of(small(workdir), before=AS_USER)
    finally:
        (workdir / place).chmod(before)
    assert done.returncode == code, done.stderr
    assert [message in line for line in done.stderr.splitlines() if line.startswith("error: ")] == [True]
    assert "Traceback" not in done.stderr
    assert_same_bits(train.run(tiny(), workdir), straight[2])


def program_of(arguments: list[str], before: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """A program on eight devices, as here, when it has ended."""
    command = [*before, sys.executable, "-m", *arguments]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_workdir_that_another_run_holds_is_refused(tmp_path):
    with workdir_lock.held(tmp_path, print):
        with pytest.raises(ConfigError, match=rf"{tmp_path} is in use by process {os.getpid()} on "):
            train.run(tiny(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [workdir_lock.FILE]


class Harmful(list):
    """Examples. When some have been read, something happens to the workdir."""

    def __init__(self, examples, harm):
        super().__init__(examples)
        self.harm, self.left = harm, 3 * 16

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            self.harm()
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda workdir: (workdir / workdir_lock.FILE).write_text("other"), "run was taken over by a process that"),
        (shutil.rmtree, "run was removed or moved while this run used it"),
    ],
)
def test_a_run_that_loses_its_lock_ends_before_it_writes(tmp_path, monkeypatch, harm, says):
    workdir = tmp_path / "run"

    def data(split, *, data_dir=None, dequantize=True):
        dataset = digits_data.make(split, data_dir=data_dir, dequantize=dequantize)
        return dataset._replace(source=Harmful(dataset.source[:64], lambda: harm(workdir)))

    monkeypatch.setattr(sys.modules[__name__], "make_data_of_the_test", data, raising=False)
    with pytest.raises(ConfigError, match=says):
        train.run(tiny(data__name=f"{__name__}:make_data_of_the_test", input__num_threads=0), workdir)
    assert set(Checkpoints(workdir / "checkpoints").steps()) <= {2}
    logged = workdir / "metrics.jsonl"
    assert not logged.exists() or len(logged.read_text().splitlines()) <= 3


class Sleeping(list):
    """Examples. One of them takes the last process for ever."""

    def __getitem__(self, index):
        if index == 3 and jax.process_index() == jax.process_count() - 1:
            time.sleep(600)
        return super().__getitem__(index)


def make_sleeping(split, *, data_dir: str | None = None, dequantize: bool = True):
    dataset = digits_data.make(split, data_dir=data_dir, dequantize=dequantize)
    return dataset._replace(source=Sleeping(dataset.source[:64]))


@pytest.mark.slow
def test_a_hang_ends_in_stacks_and_a_code_that_asks_for_a_restart(tmp_path):
    flags = ["--config.watchdog=6", "--config.total_steps=50", "--config.batch_size=8", "--config.input.num_threads=0"]
    command = [sys.executable, "-m", "diversedit_jax.train", "--config=configs/digits.py", f"--workdir={tmp_path}"]
    command += [*flags, "--config.data.name=tests.test_train:make_sleeping"]
    command += ["--config.model.depth=2", "--config.model.width=16", "--config.model.heads=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGALRM, done.stderr
    assert "Timeout (0:00:06)!" in done.stderr
    assert "in __getitem__" in done.stderr, "the stack says where it hangs"


def damage(step: Path) -> None:
    """Cut off the largest file of a checkpoint."""
    files = sorted(step.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    files[-1].write_bytes(files[-1].read_bytes()[:100])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(straight, tmp_path, capfd):
    shutil.copytree(straight[1], tmp_path / "run")
    kept = tmp_path / "run" / "checkpoints"
    damage(kept / "6")
    state = train.run(tiny(), tmp_path / "run")
    said = capfd.readouterr().err
    assert re.search(r"checkpoints/6 is damaged \(.*\); it is set aside as 6.damaged-\d+-\d+", said)
    assert "resuming from step 4 of 6" in said
    assert_same_bits(state, straight[2])
    assert losses(tmp_path / "run") == losses(straight[1])
    assert Checkpoints(kept).steps() == [2, 4, 6], "the step was saved again"
    assert len(list(kept.glob("6.damaged-*"))) == 1

    for step in (2, 4, 6):
        damage(kept / str(step))
    for tried in ("6, 4, 2", "2"):
        with pytest.raises(
            CheckpointError, match=rf"no whole checkpoint in .*: tried {tried}; the last: .*/2 is damaged"
        ) as error:
            train.run(tiny(), tmp_path / "run")
        assert error.value.exit_code == 74
    assert len(list(kept.iterdir())) == 4, "nothing is removed, and the run does not begin anew"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 20},
            r"batch_size = 20 is not divisible by 8 \(data x fsdp of config.mesh\); nearest: 16 or 24",
        ),
        ({"accumulate": 3}, r"not divisible by 8 \(.*\) x 3 accumulated parts; nearest: 24"),
        ({"model__patch": 3}, r"patches of 3 x 3 do not divide examples of 8 x 8"),
        ({"model__heads": 3}, r"model.heads = 3 does not divide the width 16"),
        ({"model__skip": "relase"}, r"model.skip = 'relase' is unknown; did you mean 'release'"),
        ({"losses__diversity__aligned": 5}, r"diversity: aligned = 5: must be at least 1 and at most 4"),
        ({"losses__diversity__groups": 3}, r"groups = 3 must divide the batch of 16"),
        (
            {"losses__diversity__name": "diversty"},
            r"config.losses.diversity.name: unknown name 'diversty'; did you mean 'diversity'",
        ),
        ({"losses__diversity__preset": "relase"}, r"preset = 'relase' is unknown; did you mean 'release'"),
        ({"data__name": "digit"}, r"config.data.name: unknown name 'digit'; did you mean 'digits'"),
        ({"objective__path": "linaer"}, r"path = 'linaer' is unknown; did you mean 'linear'"),
        ({"objective__condition_drop": 1.5}, r"condition_drop = 1.5: must be at least 0 and at most 1"),
        ({"optim__learning_rate": float("nan")}, r"config.optim.learning_rate = nan: must be finite"),
        ({"ema_decay": 7.0}, r"config.ema_decay = 7.0: must be at least 0 and less than 1"),
        ({"total_steps": 0}, r"config.total_steps = 0: must be at least 1"),
        ({"max_skipped": -1}, r"config.max_skipped = -1: must be at least 0"),
        ({"profile": "5"}, r"config.profile = '5': wanted FIRST:LAST of steps"),
        ({"loggers": "mlflow, wnadb"}, r"config.loggers = 'wnadb' is unknown; did you mean 'wandb'\?"),
        ({"mesh__data": 3}, r"data 3 x fsdp 1 x tensor 1 must give the 8 devices that JAX sees"),
        ({"sampler__solver": "hen"}, r"solver = 'hen' is unknown; did you mean 'heun'"),
        (
            {"sampler__guidance_interval": (0.7, 0.2)},
            r"guidance_interval = \(0.7, 0.2\): must be two times with 0 <= lo <= hi <= 1",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_before_anything_compiles(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train.run(tiny(**changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "config.json").exists(), "a config that cannot run was stored"


def test_a_label_that_the_metrics_use_is_refused(tmp_path):
    config = tiny()
    config.losses.objective = slot("losses", "diversity")
    with pytest.raises(ConfigError, match=r"config.losses.objective: the metrics use this name already"):
        train.run(config, tmp_path)


def test_missing_data_is_refused(tmp_path):
    config = default.get_config()
    with pytest.raises(ConfigError, match=r"config.data.data_dir is not set; give it with --config.data.data_dir"):
        train.run(config, tmp_path)
    config.data.data_dir = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nowhere"):
        train.run(config, tmp_path)


def without_labels(directory: str) -> None:
    file = Path(directory) / "features.json"
    features = json.loads(file.read_text())
    del features["featuresDict"]["features"]["label"]
    file.write_text(json.dumps(features))


def without_records(directory: str) -> None:
    file = Path(directory) / "dataset_info.json"
    info = json.loads(file.read_text())
    for split in info["splits"]:
        split["shardLengths"] = ["0"]
    file.write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("written", "changes", "harm", "message"),
    [
        ({}, {}, without_labels, "no feature 'label', given: moments"),
        ({"labels": [0, 10]}, {}, None, r"record \d+ .* label 10 is not in 0 .. 9"),
        ({}, {"shape": (8, 8, 2)}, None, r"moments has shape \(2, 4, 6, 4\), wanted \(2, 8, 8, 4\)"),
        ({}, {}, without_records, "split 'train' of .* is empty"),
    ],
    ids=["no labels", "label", "shape", "empty"],
)
def test_data_that_do_not_fit_are_refused_before_anything_compiles(tmp_path, written, changes, harm, message):
    config = default.get_config()
    directory = write(tmp_path / "data", count=4, **written)
    config.data.update({"data_dir": directory, "num_classes": 10, **changes})
    config.update({"batch_size": 8})
    config.model.update({"size": "S"})
    if harm is not None:
        harm(directory)
    with pytest.raises(DataError, match=message) as error:
        train.run(config, tmp_path / "run")
    assert error.value.exit_code == 65
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").iterdir()), "a config that cannot run was stored"


def test_samples_of_a_run(straight, tmp_path):
    _, workdir, _ = straight
    guided = {"cfg_scale": 1.8, "guidance_interval": (0.0, 0.7)}
    folder = sample.run(source_of(workdir, **guided), num=12, out=tmp_path / "a")
    with np.load(folder / "samples.npz") as file:
        images, labels = file["arr_0"], file["labels"]
    assert images.shape == (12, 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.tolist() == [*range(10), 0, 1]
    assert (folder / "grid.png").exists()
    again = sample.run(source_of(workdir, **guided, batch_size=8), num=12, out=tmp_path / "b")
    with np.load(again / "samples.npz") as file:
        difference = np.abs(file["arr_0"].astype(int) - images.astype(int)).max()
    assert difference <= 1, "samples depend on the batch size"  # 1: rounding at the boundary of two grey levels
    seven = source_of(workdir, 4, solver="euler_maruyama", steps=3)
    seven = sample.run(seven, num=3, labels=[7], out=tmp_path / "c")
    with np.load(seven / "samples.npz") as file:
        assert file["labels"].tolist() == [7, 7, 7]
    weak = source_of(workdir, weak_step=4, cfg_scale=2.0, solver="dopri5", steps=100)
    weak = sample.run(weak, num=2, out=tmp_path / "d")
    assert (weak / "grid.png").exists()
    with pytest.raises(ConfigError, match=r"labels must be in 0 .. 9, given 10"):
        sample.run(source_of(workdir), labels=[10])
    with pytest.raises(CheckpointError, match="no step 3"):
        source_of(workdir, 3)
    with pytest.raises(ConfigError, match="holds no run"):
        trained.of_run(tmp_path)


def test_a_run_goes_out_as_a_release(straight, tmp_path):
    _, workdir, state = straight
    out = tmp_path / "run.safetensors"
    command = [sys.executable, "tools/convert_checkpoint.py", str(workdir), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    release, _ = releases.open_release(out, heads=2)
    assert release.arch.skip
    assert release.sides == (8, 8)
    assert_same_bits(release.params, state["ema"])


# --- As processes.


def command(workdir: Path, *options: str) -> list[str]:
    """The digits run, small, as a command."""
    small = ["model.width=16", "model.heads=2", "batch_size=16", "samples.num=10", "sampler.steps=2", "samples.every=0"]
    small += ["evaluators.digits.num=20", "evaluators.scores.num=100"]
    flags = [f"--config.{option}" for option in (*small, *options)]
    return [sys.executable, "-m", "diversedit_jax.train", "--config=configs/digits.py", f"--workdir={workdir}", *flags]


def start(workdir: Path, *options: str) -> subprocess.Popen:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command(workdir, *options),
        cwd=ROOT,
        env=os.environ | cache,  # so that each restart need not compile again
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digits.py", "--config.total_stepz=3"], "no key 'total_stepz'; did you mean 'total_steps'?"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["--config=configs/nope.py"], "config: file configs/nope.py not found"),
                (["--config=configs/digits.py", "--config.total_steps=ten"], "config.total_steps=ten: invalid literal"),
                (["--config=configs/digits.py", "--workdir=/proc/none"], "workdir /proc/none cannot be written"),
                (["--config=configs/digits.py", "--workdir="], "--workdir is empty: give it a value, or leave it out"),
                ([], "flag --config is required"),
            )
        ),
    ],
    ids=["unknown key", "missing file", "wrong type", "unwritable", "empty", "nothing"],
)
def test_one_line_and_exit_code_78(tmp_path, arguments, message):
    full = [sys.executable, "-m", "diversedit_jax.train", f"--workdir={tmp_path}", *arguments]
    done = subprocess.run(full, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 78, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr


def killed_and_resumed(workdir: Path, kills: int, seed: int, options: list[str]) -> str:
    """Run to the end with `kills` random SIGKILLs and SIGTERMs on the way; the output of all runs."""
    rng, output = random.Random(seed), []
    for number in itertools.count():
        process = start(workdir, *options)
        if number < kills:
            lines = []
            for line in process.stdout:  # waits until it trains, then strikes at any moment
                lines.append(line)
                if line.startswith("step"):
                    break
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        output.append("".join(lines if number < kills else []) + process.communicate(timeout=300)[0])
        assert process.returncode in ((0, 42, -signal.SIGKILL) if number < kills else (0,)), output[-1]
        if process.returncode == 0:
            return "\n".join(output)


def check_campaign(tmp_path: Path, kills: int, steps: int) -> None:
    options = [f"total_steps={steps}", "checkpoint.every=7", "log_every=5"]
    killed_and_resumed(tmp_path / "killed", kills, seed=kills, options=options)
    killed_and_resumed(tmp_path / "straight", 0, seed=0, options=options)
    metas = []
    for name in ("killed", "straight"):
        checkpoints = Checkpoints(tmp_path / name / "checkpoints")
        assert checkpoints.latest() == steps
        stored = json.loads(next((tmp_path / name / "checkpoints" / str(steps) / "meta").glob("metadata")).read_text())
        metas.append(stored["body"]["checksums"])
    assert metas[0] == metas[1], "a killed and resumed run ends with other bits"
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    check_campaign(tmp_path, kills=2, steps=60)


@pytest.mark.slow
def test_killed_many_times_it_ends_with_the_same_bits(tmp_path):
    check_campaign(tmp_path, kills=12, steps=200)


@pytest.mark.slow
def test_images_on_the_devices_train_like_those_of_the_host(tmp_path):
    test_image_collections.folder(tmp_path / "set")
    found = []
    for resident in (False, True):
        config = tiny(batch_size=8)
        config.losses = ConfigDict()
        config.data = slot("data", "images", data_dir=str(tmp_path / "set"), size=8, mirror=True, in_memory=True)
        config.input.resident = resident
        config.samples.num = 4
        train.run(config, tmp_path / str(resident))
        found.append(losses(tmp_path / str(resident)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
