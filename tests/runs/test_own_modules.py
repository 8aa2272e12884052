"""A run whose loss is its user's own, beside the config, is opened from anywhere, as long as its module is there."""

import json
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import trained
from tests import ROOT

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
from configs import digits
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
    assert "modules" not in configs.load(workdir)
    assert {str(home), str(home / "experiments")} <= set(sys.path)


def test_sampling_needs_neither_losses_nor_encoders(run, monkeypatch, tmp_path):
    workdir, home = run
    monkeypatch.setattr(sys, "path", list(sys.path))
    (home / "experiments" / "my_loss.py").rename(tmp_path / "gone.py")
    source = trained.drawing(trained.of_run(workdir))
    assert source.sampler(source.params, source.frozen, np.arange(2), 0).shape == (2, 8, 8, 1)
    for module in ("my_loss", "my_project.objective"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    told = r"config.losses.own.name: cannot load 'my_loss:make': No module named 'my_loss'; a module lies beside"
    with pytest.raises(ConfigError, match=told):
        trained.of_run(workdir, losses=True)


def test_a_resumed_run_keeps_the_places_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "one_loss.py").write_text(LOSS)
    tree = {"data": {"name": "digits"}, "model": {}, "objective": {"name": "one_loss:make"}}
    for _ in range(2):
        assert configs.claim(tmp_path, ConfigDict(tree)) == []
        assert json.loads((tmp_path / "config.json").read_text())["modules"] == {"one_loss": str(tmp_path)}
