"""A run on latents that are not square: resumed where its files have moved, exported, sampled with either weights."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import sample, train
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import default
from diversedit_jax.data import Dataset
from diversedit_jax.errors import CheckpointError, ConfigError, DataError
from diversedit_jax.runs import build, trained
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tests.data.test_latents import write
from tools import convert_checkpoint

LABEL = tfds.features.ClassLabel(num_classes=10)


def config_of(data, steps=2):
    config = default.get_config()
    config.update({"total_steps": steps, "batch_size": 8, "ema_decay": 0.5})
    config.data.data_dir = str(data)
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.samples.num = 0
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 8})
    config.optim.learning_rate = 0.1
    config.losses = ConfigDict()
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of two steps, and its data."""
    home = tmp_path_factory.mktemp("moved")
    data = write(home / "data", label=LABEL)
    train.run(config_of(data), home / "run")
    return home / "run", data


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run", run[1]


def test_data_may_move_and_what_they_hold_may_not(copied, tmp_path, capfd):
    workdir, data = copied
    moved = shutil.copytree(data, tmp_path / "moved")
    train.run(config_of(moved, steps=3), workdir)
    assert f"config.data.data_dir: {str(data)!r} -> {str(moved)!r}" in capfd.readouterr().err
    before = (workdir / "config.json").read_bytes()
    for other, told in (
        (write(tmp_path / "fewer", count=19, label=LABEL), "data.examples: 20 there, 19 given"),
        (write(tmp_path / "other", labels=range(9, -1, -1), label=LABEL), "data.condition.0: '[0-9a-f]{8}' there"),
    ):
        with pytest.raises(
            ConfigError, match=rf"holds a run with other settings .*{told}.*: give the data and weights"
        ):
            train.run(config_of(other, steps=4), workdir)
    assert (workdir / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "old", "new", "allowed"),
    [
        ("data.data_dir", "/a", "/b", True),
        ("codec.vae", "/a", "/b", True),
        ("codec.vae", None, "/b", False),  # its samples would be images now
        ("encoders.dinov2.file", "/a", "/b", True),
        ("init_from.file", "/a", "/b", True),
        ("model.file", "/a", "/b", False),
        ("data.num_classes", None, 10, True),  # a run from before it had to be told
        ("data.num_classes", 10, 11, False),
        ("total_steps", 1, 2, True),
        ("seed", 1, 2, False),
    ],
)
def test_what_may_change_on_resume(key, old, new, allowed, tmp_path):
    def config(value):
        tree = {"data": {}, "model": {}, "objective": {}, "init_from": {"fresh": [], "trust": False}, "loggers": ""}
        *path, leaf = key.split(".")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
        place[leaf] = value
        return ConfigDict(tree)

    configs.claim(tmp_path, config(old))
    if allowed:
        assert configs.claim(tmp_path, config(new)) == [f"config.{key}: {old!r} -> {new!r}"]
        return
    with pytest.raises(ConfigError, match=rf"other settings \({key}: {re.escape(repr(old))} there"):
        configs.claim(tmp_path, config(new))


def test_an_option_that_a_run_does_not_know_has_its_default(tmp_path):
    config = default.get_config()
    config.losses.diversity = slot("losses", "diversity")
    configs.claim(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    for place, option in ((stored["losses"]["diversity"], "groups"), (stored["model"], "qk_norm")):
        del place[option]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert configs.claim(tmp_path, config) == []
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config.losses.diversity.groups = 2
    with pytest.raises(ConfigError, match=r"other settings \(losses.diversity.groups: 1 there, 2 given"):
        configs.claim(tmp_path, config)


def test_an_export_keeps_height_and_width_and_says_its_heads(run, tmp_path):
    for weights in ("ema", "online"):
        release, _ = convert_checkpoint.of_run(run[0], weights)
        arrays = releases.export(release.params, release.family, release.arch, release.sides)
        write_safetensors(tmp_path / f"{weights}.safetensors", arrays, {"heads": str(release.arch.heads)})
        again = releases.open_release(tmp_path / f"{weights}.safetensors")[0]
        assert (again.sides, again.arch.heads, again.arch.num_classes) == ((4, 6), 2, 10)
        found = trained.of_run(run[0])
        wanted = jax.device_get(found.load(found.last, weights))
        jax.tree.map(np.testing.assert_array_equal, again.params, wanted)


def test_samples_of_the_trained_weights_lie_beside_those_of_the_ema(run, tmp_path):
    drawn = {}
    for weights, folder in (("ema", "samples_2"), ("online", "samples_2_online")):
        source = trained.drawing(trained.of_run(run[0]), weights=weights)
        assert source.folder == run[0] / folder
        assert source.about["weights"].get("online", False) == (weights == "online")
        sample.run(source, num=4, out=tmp_path / weights)
        drawn[weights] = np.load(tmp_path / weights / "samples.npz")["arr_0"]
    assert drawn["ema"].shape == (4, 4, 6, 2)
    assert np.abs(drawn["ema"] - drawn["online"]).max() > 1e-3


def test_every_program_opens_a_run_of_a_larger_machine(copied):
    workdir, _ = copied
    stored = json.loads((workdir / "config.json").read_text())
    stored["mesh"]["fsdp"] = 3  # does not divide the 8 devices here
    (workdir / "config.json").write_text(json.dumps(stored))
    assert convert_checkpoint.of_run(workdir)[0].family == "sit"
    assert trained.drawing(trained.of_run(workdir)).space.shape == (4, 6, 2)


def test_a_run_without_a_checkpoint_says_so_in_every_program(copied):
    workdir, _ = copied
    shutil.rmtree(workdir / "checkpoints" / "2")
    for use in (convert_checkpoint.of_run, lambda path: trained.drawing(trained.of_run(path))):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            use(workdir)


def test_what_makes_a_run_is_in_its_checkpoint(copied):
    """Without config.json another seed, rate or batch size is refused as with it."""
    workdir, data = copied
    (workdir / "config.json").unlink()
    config = config_of(data, steps=3)
    config.seed, config.optim.learning_rate = 1, 0.2
    with pytest.raises(ConfigError, match=r"optim.learning_rate: 0.1 there, 0.2 given; seed: 0 there, 1 given"):
        train.run(config, workdir)
    assert not (workdir / "config.json").exists()
    train.run(config_of(data, steps=3), workdir)
    assert configs.load(workdir).total_steps == 3


class Torn:
    """Five examples of a user's data; the second cannot be read."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == 1:
            raise OSError("torn")
        return {"x": np.zeros((4, 4, 1), np.float32), "y": {"text": np.full((2, 3), index, np.float32)}}


def test_a_record_that_cannot_be_read_is_left_out_of_the_digest_and_named_in_samples():
    space = Space((4, 4, 1), Conditions({"text": np.zeros((2, 3), np.float32)}))
    digests = build.inputs(default.get_config(), Dataset(Torn(), None, space))["data"]
    assert digests["examples"] == 5
    assert list(digests["condition"]) == ["0", "2", "3", "4"]
    assert len(set(digests["condition"].values())) == 4
    with pytest.raises(DataError, match="record 1: OSError: torn"):
        build.conditions(lambda split: Dataset(Torn(), None, space), space, None, 3, seed=0)
