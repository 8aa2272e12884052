"""The package as a user installs it: a wheel, in an environment with nothing else, far from the checkout."""

import os
import subprocess
import sys

import pytest

from tests import ROOT

pytestmark = pytest.mark.slow

TRAINS = """
import diversedit_jax
from diversedit_jax.configs import digits
config = digits.get_config()
config.update({"total_steps": 20, "batch_size": 16})
config.samples.num, config.evaluators = 0, {}
config.model.update({"depth": 2, "width": 16, "heads": 2})
print(diversedit_jax.train(config, "runs/small"))
"""
SAMPLES = """
import diversedit_jax
model = diversedit_jax.load("runs/small")
print(repr(model.sample(labels=[3, 5], num=4, steps=3)))
"""
LOSSES = """
import importlib.metadata, jax
from diversedit_jax.losses import *
installed = {one.metadata["Name"] for one in importlib.metadata.distributions()}
assert not installed & {"flax", "optax", "jaxtyping", "absl-py", "orbax-checkpoint"}, installed
blocks = [jax.random.normal(jax.random.key(i), (8, 16, 32)) for i in range(6)]
projector = init_projector(jax.random.key(0), 32, 64, 48)
targets = jax.random.normal(jax.random.key(9), (8, 16, 48))
found = diversity_loss(blocks)[0], repa_loss(project(projector, blocks[0]), targets).mean()
print([float(x) for x in (*found, sra_loss(*blocks[:2]).mean(), dispersive_loss(blocks[0]))])
"""


def run(*command, folder):
    """Run a command in a folder, without what the checkout or this environment would add."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    run("git", "clone", "--quiet", str(ROOT), str(source), folder=out)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source), folder=out)
    (found,) = out.glob("*.whl")
    return found


def environment(folder, *packages):
    """The Python of a new environment with these packages."""
    run(sys.executable, "-m", "venv", "env", folder=folder)
    python = str(folder / "env" / "bin" / "python")
    constraints = str(ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, *packages, folder=folder)
    return python


def test_a_wheel_alone_trains_samples_and_plans(wheel, tmp_path):
    python = environment(tmp_path, str(wheel))
    assert "step 20" in run(python, "-c", TRAINS, folder=tmp_path)
    assert run(python, "-c", SAMPLES, folder=tmp_path).strip() == "<Samples uint8 [4, 8, 8, 1]>"
    planned = run(python, "-m", "diversedit_jax.train", "--config=diversedit:xl2", "--dry_run", folder=tmp_path)
    assert "not set: 1,281,167 random latents [32, 32, 4] of 1,000 classes stand in" in planned
    assert "dit: " in planned
    command = str(tmp_path / "env" / "bin" / "diversedit")
    assert "diversedit train" in run(command, folder=tmp_path)
    assert "\n  digits " in run(command, "train", "--help", folder=tmp_path), "the recipes"
    out = run(command, "sample", "--workdir=runs/small", "--num=2", "--quiet", folder=tmp_path)
    assert out.startswith("2 samples of small, step 20 in ")


def test_the_losses_compute_with_jax_alone(wheel, tmp_path):
    python = environment(tmp_path, "jax")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel), folder=tmp_path)
    assert run(python, "-c", LOSSES, folder=tmp_path).count(",") == 3
