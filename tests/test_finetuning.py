"""configs/finetuning.md: its commands run in order, on a small stand-in for the release."""

import json
import os
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

from diversedit_jax import data, train
from diversedit_jax.config import slot
from diversedit_jax.configs import digits, finetune
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build, starting, trained
from diversedit_jax.runs.check import check
from diversedit_jax.weights import dit as releases
from tests import ROOT

PAGE = (ROOT / "configs" / "finetuning.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
SMALL = """
from ml_collections import ConfigDict
from diversedit_jax.config import slot
from diversedit_jax.configs import finetune

def get_config(variant):
    config = finetune.get_config(variant)
    config.data, config.codec = slot("data", "digits"), slot("codecs", "pixels")
    config.model.update({"size": "B", "depth": 4, "width": 32, "heads": 2, "dtype": "float32"})
    config.losses.diversity.groups = 1
    config.init_from.heads = 2
    config.batch_size, config.total_steps = 32, 3
    config.sampler.update({"steps": 2, "batch_size": 32})
    config.samples.num = 10
    return config
"""
# What the page says, and what the stand-in needs: names and sizes alone.
CHANGES = {
    "--config=finetune:xl2": "--config=small.py:xl2",
    "SiT-XL-2-256.pt": "sit.safetensors",
    "--config.data.data_dir=LATENTS": None,
    "--data=latents=LATENTS": "--data=digits",
    "--vae=sd-vae-ft-ema": "--data=digits",
    "--extractor=inception=classify_image_graph_def.pb": "--extractor=digits",
    "VIRTUAL_imagenet256_labeled.npz": "digits.npz",
    "--preset=sit": "--num=110",
    "--steps=25": "--steps=2",
}


def changed(word):
    for old, new in CHANGES.items():
        if old in word:
            return new and word.replace(old, new)
    return word


def commands():
    """The commands of the page, for the stand-in."""
    for words in COMMANDS:
        found = [new for word in words if (new := changed(word)) is not None]
        if "analyze" in words[2]:
            found += ["--num=16", "--skip=times,estimators,probe,gradients,connections,maps"]
        if any("sit.safetensors" in word for word in found) and "train" not in words[2]:
            found.append("--heads=2")
        yield found


def run(words, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, *words[1:]]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small SiT that was trained on digits for a few steps, in the layout of the official release."""
    folder = tmp_path_factory.mktemp("finetuning")
    config = digits.get_config()
    config.model = slot("models", "official_sit", depth=4, width=32, heads=2)
    config.losses = {}
    config.evaluators = {}
    config.update({"total_steps": 20, "batch_size": 32})
    config.samples.num = 0
    train.run(config, folder / "runs" / "sit")
    run(["python", "-m", "tools.convert_checkpoint", "runs/sit", "sit.safetensors", "--to=official_sit"], folder)
    (folder / "small.py").write_text(SMALL)
    x = np.stack([example["x"] for example in data.make("digits", "test").source])
    np.savez(folder / "digits.npz", arr_0=np.clip((x + 1) * 127.5, 0, 255).astype(np.uint8))
    return folder


@pytest.mark.slow
def test_the_commands_of_the_page_run(folder):
    told = {}
    for words in commands():
        told.setdefault(words[2].rpartition(".")[2], []).append(run(words, folder))
    assert "official_sit" in told["convert_checkpoint"][0]
    assert "image size    8 x 8" in told["convert_checkpoint"][0]
    for said in told["train"]:
        assert "starting from sit.safetensors; new: merges\n" in said
        assert "from sit.safetensors:" not in said
    before, first = (np.load(folder / "runs" / f"images_{name}" / "samples.npz") for name in ("before", "first"))
    np.testing.assert_array_equal(before["labels"], first["labels"])
    assert np.abs(before["arr_0"].astype(int) - first["arr_0"]).max() <= 1
    scores = [json.loads((folder / "runs" / name / "scores.json").read_text()) for name in ("before", "after")]
    assert scores[0]["scores"].keys() == scores[1]["scores"].keys()
    for name in ("before_blocks", "after_blocks"):
        assert (folder / "runs" / name / "report.html").exists()
    assert trained.of_run(folder / "runs" / "finetuned").last == 3


@pytest.mark.slow
def test_old_parts_are_frozen_and_groups_are_set_on_the_command_line(folder):
    """They keep the bits of the release, and so does their EMA; the new parts learn."""
    words = ["python", "-m", "diversedit_jax.train", "--config=small.py:xl2", "--workdir=runs/frozen"]
    words += ["--config.init_from.file=sit.safetensors", "--config.optim.learning_rate=0.0"]
    run([*words, "--config.groups.new.learning_rate=3e-2", "--config.groups.new.warmup_steps=0"], folder)
    found, (release, _) = trained.of_run(folder / "runs" / "frozen"), open_release(folder)
    for weights in trained.WEIGHTS:
        params = found.load(3, weights)
        merges = params.pop("merges")
        jax.tree.map(np.testing.assert_array_equal, params, release.params)
    assert np.abs(merges["linear"]["kernel"]).max() > 1e-2


def open_release(folder):
    return releases.open_release(folder / "sit.safetensors", "official_sit", 2)


def test_every_command_of_the_page_is_tried():
    assert len(COMMANDS) == 10
    assert all(old in PAGE for old in CHANGES)


@pytest.mark.parametrize("words", ["", "xl2,512", "b2,gated"])
def test_the_recipe(words):
    config = finetune.get_config(words)
    config.data.data_dir = "LATENTS"
    check(config)
    assert config.model.base_grid == (16 if "512" in words else None)
    skip = ("gate", None) if "gated" in words else ("release", "identity")
    assert (config.model.skip, config.model.skip_init) == skip
    assert config.groups.new.of == "^params/merges/"
    assert config.groups.new.learning_rate == 10 * config.optim.learning_rate
    with pytest.raises(ConfigError, match=r"config.init_from.file is not set, and config.init_from.family = 'offic"):
        starting.start(build.Experiment(config, None, None, None, {}), {})
