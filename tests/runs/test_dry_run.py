"""What `--dry_run` says of a run. It writes nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import train
from diversedit_jax.config import slot
from diversedit_jax.configs import digits, mmdit, sit, video
from diversedit_jax.data import clip_tokenizer
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.runs import dry_run
from tests import captioned


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(dry_run, "SECONDS", 0.1)
    config = digits.get_config()
    config.update({"total_steps": 30, "batch_size": 16})
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.samples.num = 0
    config.evaluators = {}
    return config


def test_it_says_what_a_run_would_do_and_writes_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.dry_run(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    found = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in found.splitlines() if re.match(r"[a-z]+ +\S", line))
    assert "patch_embed/kernel" in found
    assert lines["network"] == f"dit: {re.search('Total: ([0-9,]+)', found)[1]} parameters"
    assert lines["losses"] == "diversity (diversity)"
    assert lines["batch"] == "x float32 [16, 8, 8, 1], y int32 [16]"
    assert lines["training"].startswith("30 steps of 16 = 480 examples, 0.334 epochs of 1,437")
    assert re.match(r"[\d.]+ [kMG]B a device for the state, [\d.]+ [kMG]B in a step \(compiled\), of", lines["memory"])
    assert lines["checkpoint"].endswith("every 500 steps; the newest 3 stay")
    assert re.match(r"\d+s at [\d.,]+ steps/s, measured on \d+ x cpu", lines["time"])


@pytest.mark.slow
def test_a_run_that_goes_on_has_fewer_steps_left(config, tmp_path, capsys):
    config.total_steps = 2
    train.run(config, tmp_path / "run")
    config.total_steps = 30
    before = sorted(tmp_path.rglob("*"))
    train.dry_run(config, tmp_path / "run")
    assert "28 steps of 16" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_data_that_are_not_given_have_a_stand_in_of_the_recipes_shape():
    config, assumed = dry_run.with_data(sit.get_config("b2,512"))
    assert assumed == (
        "config.data.data_dir is not set: 1,281,167 random latents [64, 64, 4] of 1,000 classes stand in for the data"
    )
    assert config.data.shape == (64, 64, 4)
    config, assumed = dry_run.with_data(digits.get_config())
    assert (config.data.name, assumed) == ("digits", None)


@pytest.mark.parametrize("words", ["", "joint"])
def test_videos_that_are_not_given_have_a_stand_in_too(words, monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "SECONDS", 0.1)
    config = video.get_config(words)
    config.model.update({"depth": 4, "width": 16, "heads": 2, "dtype": "float32"})
    config.data.shape, config.batch_size = (2, 8, 8, 4), 8
    train.dry_run(config)
    said = capsys.readouterr()
    assert "random latents [2, 8, 8, 4] of 1,000 classes stand in for the data" in said.out + said.err
    assert "x float32 [8, 2, 8, 8, 4]" in said.out


def test_every_error_of_the_config_is_found(config):
    config.init_from.file = "nowhere.safetensors"
    with pytest.raises(RunError, match=r"config\.init_from: .*nowhere\.safetensors"):
        train.dry_run(config)
    config.losses.more = slot("losses", "repa")
    config.losses.more.block = 9
    with pytest.raises(ConfigError, match=r"config\.losses\.more: block = 9"):
        train.dry_run(config)


def test_the_memory_of_a_program_is_what_it_takes_and_makes():
    program = jax.jit(lambda x: (x @ x, x.sum())).lower(np.zeros((512, 512), np.float32)).compile()
    assert dry_run.memory(program) >= 2 * 512 * 512 * 4
    placed = jax.device_put(jnp.zeros((8, 4)), jax.NamedSharding(jax.make_mesh((2,), ("a",)), jax.P("a")))
    assert dry_run.on_device({"x": placed}) == 4 * 4 * 4


@pytest.mark.parametrize(("count", "text"), [(12, "0.012 kB"), (5_535_812, "5.54 MB"), (25_300_000_000, "25.3 GB")])
def test_bytes_for_people(count, text):
    assert dry_run.size(count) == text


def test_captions_that_are_not_given_have_random_tokens(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dry_run, "SECONDS", 0.1)
    monkeypatch.setattr(clip_tokenizer, "LENGTH", captioned.LENGTH)
    config = mmdit.get_config()
    config.text_encoder.file = str(captioned.encoder())
    config.model.update({"depth": 2, "width": 16, "heads": 2, "table": 16, "dtype": "float32"})
    config.update({"batch_size": 8, "total_steps": 20})
    train.dry_run(config, tmp_path / "run")
    said = capsys.readouterr()
    assert "82,783 random latents [32, 32, 4] with 16 random tokens stand in for the data" in said.out + said.err
    assert "y int32 [8, 16]" in said.out
