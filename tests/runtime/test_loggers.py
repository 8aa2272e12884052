"""What a run sends to Weights & Biases and MLflow, and that neither can end it."""

import importlib
import json
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import cli, loggers
from diversedit_jax.runtime.loggers import Loggers
from diversedit_jax.runtime.metric_writer import MetricWriter
from tests.parts import logged

CONFIG = {"seed": 0, "model": {"name": "dit", "shape": (8, 8)}, "init_from": {"file": None}}
PICTURE = np.full((6, 5, 1), 7, np.uint8)


@pytest.fixture
def fake(monkeypatch):
    """`wandb` is a tracker in memory, which counts as installed."""
    return logged(monkeypatch, "wandb")


def write(folder, notes=None, text="wandb", ends=None, begin=0):
    """Write a few things as a run does. ends: the error that ends it."""
    notes = [] if notes is None else notes
    with Loggers(text, CONFIG, folder, notes.append) as others, MetricWriter(folder, begin, others) as writer:
        writer.write_scalars(begin + 1, {"loss/total": 0.5, "bad": np.float32(-np.inf)})
        writer.write_images(begin + 1, {"samples": PICTURE})
        writer.write_images(begin + 1, {})
        writer.write_scalars(begin + 2, {"loss/total": np.nan})
        if ends is not None:
            raise ends


def test_a_logger_gets_what_the_files_get(fake, tmp_path):
    write(tmp_path)
    (one,) = fake.made
    assert one.config == CONFIG
    (first, image, second), numbers = one.written, {"loss/total": 0.5, "bad": -np.inf}
    assert (first, image) == ((1, numbers), (1, {"samples": PICTURE.shape}))
    assert second[0] == 2
    assert np.isnan(second[1]["loss/total"])
    assert one.end == loggers.FINISHED


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (cli.Stopped("SIGTERM"), loggers.STOPPED),
        (ValueError("wrong"), loggers.FAILED),
        (KeyboardInterrupt(), loggers.FAILED),
    ],
)
def test_it_is_told_how_the_run_ends(fake, tmp_path, error, end):
    with pytest.raises(type(error)):
        write(tmp_path, ends=error)
    assert fake.made[0].end == end


def test_the_id_stays_in_the_workdir(fake, tmp_path):
    write(tmp_path)
    write(tmp_path, begin=2)
    assert [(one.id, one.known) for one in fake.made] == [("id0", None), ("id0", "id0")]
    (tmp_path / loggers.FILE).write_text("[1, 2")
    write(tmp_path, begin=4)
    assert (fake.made[2].id, fake.made[2].known) == ("id2", None), "a damaged file is no id"


@pytest.mark.parametrize("what", ["start", "scalars", "images", "close"])
def test_a_failure_is_noted_once_and_nothing_is_raised(fake, tmp_path, what):
    fake.broken, notes = (what,), []
    write(tmp_path, notes)
    (told,) = [note for note in notes if "could not" in note]
    assert told.startswith("wandb could not ")
    assert told.endswith("the training goes on: RuntimeError: the server is away")
    wanted = {"start": None, "scalars": 1, "images": 2, "close": 3}[what]
    assert wanted is None or len(fake.made[0].written) == wanted, "the rest is written"


def test_after_a_failure_it_waits_before_it_tries_again(fake, tmp_path, monkeypatch):
    clock, notes = [0.0], []
    monkeypatch.setattr(loggers.time, "monotonic", lambda: clock[0])
    others = Loggers("wandb", CONFIG, tmp_path, notes.append)
    for step, now, broken in [(1, 0.0, ["scalars"]), (2, 599.0, []), (3, 601.0, []), (4, 602.0, [])]:
        clock[0], fake.broken = now, broken
        others.write_scalars(step, {"loss": 1.0})
    assert [step for step, _ in fake.made[0].written] == [3, 4]
    assert len(notes) == 2, "where it is, and the failure"


def test_a_library_that_is_not_installed_is_refused(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()  # the library leaves such a folder, and Python would import it
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(
        ConfigError, match=r"config.loggers = 'wandb': wandb is not installed: pip install -e .\[wandb\]"
    ):
        loggers.check_installed("wandb")
    assert loggers.named("") == []


def test_a_run_without_loggers_imports_none(tmp_path):
    before = set(sys.modules) & {"wandb", "mlflow"}
    write(tmp_path, text="")
    assert set(sys.modules) & {"wandb", "mlflow"} == before
    assert not (tmp_path / loggers.FILE).exists()


# The real libraries, where they are installed.


def records_of(folder: Path):
    """All records in the offline files of Weights & Biases, the oldest file first. A file is a log as of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        data, place, held = file.read_bytes(), 7, b""  # 7: its header
        while len(data) - place >= 7:
            _, length, kind = struct.unpack_from("<IHB", data, place)
            if kind == 0:  # the end of a block of 32 kB is empty
                place += 32768 - place % 32768
                continue
            held += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(held)
                held = b""
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768


def history(records):
    rows = [one.history for one in records if one.WhichOneof("record_type") == "history"]
    return [{".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def hooks():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.exit, sys.excepthook


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The real Weights & Biases, without a network, in an empty working directory."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "digits")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.exit, sys.excepthook
    yield tmp_path / "run"
    assert before == (
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        sys.exit,
        sys.excepthook,
    )
    assert not list((tmp_path / "here").iterdir()), "it wrote to the working directory"
    wandb.teardown()


def test_wandb_keeps_everything_offline(offline, capfd):
    notes = []
    offline.mkdir()
    with pytest.raises(cli.Stopped):
        write(offline, notes, ends=cli.Stopped("SIGTERM"))
    write(offline, notes, begin=1)
    assert capfd.readouterr() == ("", "")
    found = list(records_of(offline / "wandb"))
    runs = [one.run for one in found if one.WhichOneof("record_type") == "run"]
    ids = json.loads((offline / loggers.FILE).read_text())
    assert {(one.run_id, one.project) for one in runs} == {(ids["wandb"], "digits")}
    assert runs[0].display_name == "run"
    kept = {i.key: json.loads(i.value_json) for one in found for i in one.config.update}
    kept |= {i.key: json.loads(i.value_json) for one in runs for i in one.config.update}
    assert kept["model"] == {"name": "dit", "shape": [8, 8]}
    assert (kept["seed"], kept["init_from"]) == (0, {"file": None})
    rows = history(found)
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 2, 3], "the second part began at step 1"
    assert (rows[0]["loss/total"], rows[0]["bad"]) == (0.5, -np.inf)
    assert np.isnan(rows[2]["loss/total"])
    assert list((offline / "wandb").rglob(Path(rows[1]["samples.path"]).name))
    exits = [one.exit.exit_code for one in found if one.WhichOneof("record_type") == "exit"]
    assert exits == [42, 0]
    assert sum(one.WhichOneof("record_type") == "preempting" for one in found) == 1
    assert notes[0].startswith(f"wandb: wandb sync {offline}/wandb/offline-run-")


def test_mlflow_keeps_everything_in_a_folder(monkeypatch, tmp_path, capfd):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")
    for name in loggers.MLFLOW:
        monkeypatch.setenv(name, loggers.MLFLOW[name])  # removed again after the test
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(cli.Stopped):
        write(tmp_path / "run", text="mlflow", ends=cli.Stopped("SIGTERM"))
    assert capfd.readouterr() == ("", "")
    run_id, client = json.loads((tmp_path / "run" / loggers.FILE).read_text())["mlflow"], mlflow.MlflowClient()
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name) == ("KILLED", "run")
    assert client.get_experiment(found.info.experiment_id).name == "digits"
    wanted = {"seed": "0", "model.name": "dit", "model.shape": "[8, 8]", "init_from.file": "None"}
    assert found.data.params == wanted
    monkeypatch.setitem(CONFIG, "seed", 5)
    write(tmp_path / "run", text="mlflow", begin=2)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert (found.data.params, found.data.tags["config.seed"]) == (wanted, "5")
    losses = [(one.step, one.value) for one in client.get_metric_history(run_id, "loss/total")]
    assert losses[::2] == [(1, 0.5), (3, 0.5)]
    assert np.isnan([value for _, value in losses[1::2]]).all()
    assert client.get_metric_history(run_id, "bad")[0].value == -np.inf
    names = [Path(one.path).name for one in client.list_artifacts(run_id, "images")]
    assert sum(name.startswith("samples+step+1") and name.endswith(".png") for name in names) == 1
    assert [path.name for path in (tmp_path / "run").glob("ml*")] == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_without_a_server_the_run_goes_on(name, monkeypatch, tmp_path, capfd):
    """No key for W&B; for MLflow a port at which nothing listens."""
    pytest.importorskip(name)
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for variable in loggers.MLFLOW:
        monkeypatch.setenv(variable, "0" if "RETRIES" in variable else loggers.MLFLOW[variable])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    notes = []
    write(tmp_path, notes, text=name)
    (told,) = notes
    assert told.startswith(f"{name} could not start, the training goes on: ")
    assert name != "wandb" or "WANDB_API_KEY" in told
    assert capfd.readouterr() == ("", "")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
