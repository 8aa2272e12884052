"""A run whose loss is its user's own, beside the config, is opened from anywhere, as long as its module is there.

A workdir may come from anywhere, too. What its config names outside of the package runs only if the user says so.
"""

import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import evaluate
from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import trained
from tests import ROOT
from tools import convert_checkpoint

LOSS = """
import jax.numpy as jnp
from diversedit_jax.api import AuxLoss, Term

def make(*, scale: float = 0.1):
    def apply(forward, batch, context):
        return Term(scale * jnp.square(forward.features[1]).mean(), {})
    return AuxLoss(apply, blocks=(1,))
"""
OBJECTIVE = """
from diversedit_jax import objectives
def make():
    return objectives.make("flow_matching")
"""
CONFIG = """
from diversedit_jax.configs import digits
from diversedit_jax.config import slot

def get_config():
    config = digits.get_config()
    config.update({"total_steps": 1, "batch_size": 16})
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.losses = {"own": slot("losses", "my_loss:make", scale=0.2)}
    config.objective = slot("objectives", "my_project.objective:make")
    config.sampler.update({"solver": "euler", "steps": 1, "batch_size": 16})
    config.samples.num = 0
    config.evaluators = {}
    return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run by the command, in a folder of the user's own, and that folder."""
    home = tmp_path_factory.mktemp("own")
    (home / "my_project").mkdir()
    (home / "my_project" / "objective.py").write_text(OBJECTIVE)
    (home / "experiments").mkdir()
    (home / "experiments" / "my_loss.py").write_text(LOSS)
    (home / "experiments" / "mine.py").write_text(CONFIG)
    program(home, "train", f"--config={home}/experiments/mine.py", f"--workdir={home}/run")
    return home / "run", home


def program(folder, name, *arguments):
    command = [sys.executable, "-m", f"diversedit_jax.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_run_knows_where_its_modules_lie(run, monkeypatch):
    workdir, home = run
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["modules"] == {"my_loss": str(home / "experiments"), "my_project.objective": str(home)}
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "modules" not in configs.load(workdir, trust=True)
    assert {str(home), str(home / "experiments")} <= set(sys.path)


def test_sampling_needs_neither_losses_nor_encoders(run, monkeypatch, tmp_path):
    workdir, home = run
    monkeypatch.setattr(sys, "path", list(sys.path))
    (home / "experiments" / "my_loss.py").rename(tmp_path / "gone.py")
    source = trained.drawing(trained.of_run(workdir, trust=True))
    assert source.sampler(source.params, source.frozen, np.arange(2), 0).shape == (2, 8, 8, 1)
    for module in ("my_loss", "my_project.objective"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    told = r"config.losses.own.name: cannot load 'my_loss:make': No module named 'my_loss'; a module lies beside"
    with pytest.raises(ConfigError, match=told):
        trained.of_run(workdir, losses=True, trust=True)
    (tmp_path / "gone.py").rename(home / "experiments" / "my_loss.py")


def test_a_resumed_run_keeps_the_places_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "one_loss.py").write_text(LOSS)
    tree = {"data": {"name": "digits"}, "model": {}, "objective": {"name": "one_loss:make"}, "loggers": ""}
    for _ in range(2):
        assert configs.claim(tmp_path, ConfigDict(tree)) == []
        assert json.loads((tmp_path / "config.json").read_text())["modules"] == {"one_loss": str(tmp_path)}


def run_of(folder, **names):
    """A folder with the config.json of a run on the digits, in which slots have other names. Nothing was trained."""
    tree = digits.get_config().to_dict()
    for place, name in names.items():
        slot, _, key = place.rpartition("__")
        inside = tree
        for part in slot.split("__"):
            inside = inside.setdefault(part, {"name": "repa"})
        inside[key] = name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tree | {"modules": {"foreign": str(folder)}}))
    return folder


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module in the current directory that leaves a mark when it is imported, and that mark."""
    mark = tmp_path / "imported"
    (tmp_path / "foreign.py").write_text(f"open({str(mark)!r}, 'w')\n{OBJECTIVE}\nlater = make\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield mark
    sys.modules.pop("foreign", None)


@pytest.mark.parametrize(
    ("place", "use"),
    [
        ("data__name", trained.of_run),
        ("codec__name", trained.of_run),
        ("model__name", trained.of_run),
        ("objective__name", trained.of_run),
        ("objective__name", convert_checkpoint.of_run),
        ("losses__own__name", partial(trained.of_run, losses=True)),
        ("encoders__own__name", partial(trained.of_run, losses=True)),
        ("evaluators__scores__extractor", lambda folder: evaluate.judges_of((), (), str(folder))),
        ("evaluators__own__name", lambda folder: evaluate.judges_of((), (), str(folder))),
        ("model__name", configs.load),
    ],
)
def test_what_a_stored_config_names_is_not_imported_unasked(place, use, foreign, tmp_path):
    folder = run_of(tmp_path / "run", **{place: "foreign:make"})
    assert configs.holds_run(folder)
    path = list(sys.path)
    told = f"runs code outside this package: foreign:make (config.{place.replace('__', '.')}); allow it by --trust"
    with pytest.raises(ConfigError, match=re.escape(told)):
        use(folder)
    assert not foreign.exists()
    assert sys.path == path


@pytest.mark.parametrize(
    "name", ["foreign:later", "foreign:make.func", "pydoc:browse", "os:system", ":make", "a b:make"]
)
def test_only_what_declares_itself_a_factory_is_imported(name, foreign, tmp_path):
    folder = run_of(tmp_path / "run", objective__name=name)
    with pytest.raises(ConfigError, match=r"config.objective.name: '.*' is no factory: wanted MODULE:make, or"):
        trained.of_run(folder, trust=True)
    assert not foreign.exists()


@pytest.mark.slow
def test_the_programs_run_foreign_code_with_a_flag_alone(run, tmp_path):
    workdir, _ = run
    command = [sys.executable, "-m", "diversedit_jax.sample", f"--workdir={workdir}", "--num=2", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 78
    assert done.stderr.endswith("my_project.objective:make (config.objective.name); allow it by --trust_workdir\n")
    program(tmp_path, "sample", *command[3:], "--trust_workdir")
    assert (tmp_path / "samples.npz").exists()


@pytest.mark.slow
def test_a_run_resumes_by_the_users_own_config_without_a_flag(run):
    workdir, home = run
    longer = ["--config.total_steps=2", f"--workdir={workdir}"]
    program(home, "train", f"--config={home}/experiments/mine.py", *longer)
    assert (workdir / "checkpoints" / "2").is_dir()
