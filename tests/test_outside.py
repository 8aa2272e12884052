"""Acceptance: a project outside of the package (`tests.outside`) trains, goes on after a kill, samples and is judged.

Everything goes by config alone. The project has a data set whose conditions are vectors with a mask, and a codec, a
network, an objective and a loss of its own.
"""

import json
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import analyze, evaluate, train
from diversedit_jax.config import slot
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import trained
from tests import ROOT
from tests.outside import DEVIATION, codec, config, data, means
from tests.test_train import assert_same_bits
from tools.chaos.processes import Processes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that was killed and went on, and its final state."""
    folder = tmp_path_factory.mktemp("outside")
    workdir = folder / "run"
    command = ["diversedit_jax.train", f"--config={ROOT}/tests/outside/config.py", f"--workdir={workdir}"]
    with Processes(command, 1, 8, folder) as program:
        deadline = time.monotonic() + 300
        while not (workdir / "checkpoints" / "100").is_dir():
            assert program.running[0].poll() is None, program.out()
            assert time.monotonic() < deadline, program.out()
            time.sleep(0.05)
    return workdir, train.run(config.get_config(), workdir)


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not(run, tmp_path):
    assert_same_bits(run[1], train.run(config.get_config(), tmp_path))


def test_memory_and_the_objectives_own_parameters_are_trained_and_kept(run):
    workdir, state = run
    assert state["memory"]["objective"]["examples"] == state["ema_memory"]["objective"]["examples"] == 400 * 128
    x = codec.make().encode(
        {"middle": 128.0}, {"pixels": np.stack([one["pixels"] for one in data.make("train").source]), "y": None}, None
    )["x"]
    np.testing.assert_allclose(state["memory"]["objective"]["mean"], x.mean(axis=0), atol=0.2)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in reversed(records) if "error" in record)
    assert last["error"] == pytest.approx(np.exp(last["log_u"]), rel=0.3), "log u is least where u is the error"
    assert last["learning_rate/uncertainty"] == pytest.approx(0.01)
    assert last["probe/error"] < 0.2


def test_samples_are_those_of_the_closed_form(run):
    """The network predicts the data: taken for a velocity, its samples would be about the noise minus the mean."""
    source = trained.drawing(trained.of_run(run[0], trust=True))
    each = 96
    y = jax.tree.map(lambda leaf: np.repeat(leaf, each, axis=0), source.conditions(None, 4, seed=0))
    images = source.sampler(source.params, source.frozen, y, seed=0)
    assert images.shape == (4 * each, 8, 8, 1)
    x = np.asarray(codec.make().encode({"middle": 128.0}, {"pixels": images, "y": y}, None)["x"])
    x, wanted = x.reshape(4, each, -1), means(y).reshape(4, each, -1)[:, 0]
    error = np.sqrt(np.mean((x.mean(axis=1) - wanted) ** 2))
    assert error < 2 * DEVIATION / np.sqrt(each), "of which one is expected"
    assert x.std(axis=1).mean() == pytest.approx(DEVIATION, rel=0.1)


def test_the_run_is_evaluated_and_analyzed(run, tmp_path):
    source = trained.drawing(trained.of_run(run[0], trust=True))
    judges = evaluate.judges_of((), (), str(run[0]), trust=True)
    images = evaluate.of_source(source, {}, source.sampler, 256, None, 0)
    ((_, scores),) = evaluate.run(judges, [{}], lambda point: images, tmp_path / "scores")
    assert 0 <= scores["fd_patches"] < 0.3
    settings = analyze.Settings(analyze.Estimator(), num=32, batch=16)
    analyze.run(
        [trained.of_run(run[0], losses=True, trust=True)], tmp_path / "analysis", settings, times=(0.5,), at=("last",)
    )
    report = (tmp_path / "analysis" / "report.html").read_text()
    assert "the conditions of these data are not labels" in report
    assert "gradients" in report


def test_an_objective_that_does_not_say_how_to_sample_is_never_sampled(tmp_path):
    short = config.get_config()
    short.total_steps, short.evaluators = 1, ConfigDict()
    short.objective = slot("objectives", "tests.outside.objective:make", sampled=False)
    message = r"does not say how to sample from it: Objective.predicts = None, known: .*config.samples.num=0"
    with pytest.raises(ConfigError, match=message):
        train.run(short, tmp_path)
    assert not list(tmp_path.iterdir())
    short.samples.num = 0
    train.run(short, tmp_path)
    assert not list(tmp_path.glob("samples*"))
    with pytest.raises(ConfigError, match=message):
        trained.drawing(trained.of_run(tmp_path, trust=True))


@pytest.mark.parametrize(
    "shape", [(4, 8, 8, 4), pytest.param((4, 4, 4, 1), marks=pytest.mark.slow)], ids=["video", "volume"]
)
def test_videos_and_volumes_train_and_sample(shape, tmp_path):
    own = config.get_config()
    own.update({"total_steps": 20, "batch_size": 16})
    own.losses = own.groups = own.evaluators = ConfigDict()
    own.data = slot("data", "synthetic", shape=shape, num_classes=3, size=64)
    own.codec = slot("codecs", "pixels")
    own.model = slot("models", "tests.outside.network:make")
    own.objective = slot("objectives", "flow_matching", prediction="data")
    own.sampler.update({"steps": 20, "cfg_scale": 1.5})
    state = train.run(own, tmp_path)
    assert int(state["step"]) == 20
    assert (tmp_path / "samples.png").exists()
    source = trained.drawing(trained.of_run(tmp_path, trust=True))
    assert source.sampler(source.params, source.frozen, np.arange(2, dtype=np.int32), seed=0).shape == (2, *shape)
