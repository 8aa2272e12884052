"""A run as a folder to publish: it comes back to the bit, by its path and by its name on the hub."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diversedit_jax import sample
from diversedit_jax.configs import digits
from diversedit_jax.errors import CheckpointError, ConfigError, UnfitCheckpointError, WeightsError
from diversedit_jax.runs import trained
from diversedit_jax.runtime.pictures import save_png
from tests import DATA, ROOT, untrained
from tests.hub import served
from tools import convert_checkpoint


def leave(workdir, config, *steps):
    """A run with random weights at these steps."""
    workdir.mkdir()
    untrained.leave(workdir, config, {step: ["ema", "params"] for step in steps}, 0.3)


def config_of(**model):
    config = digits.get_config()
    config.model.update({"depth": 2, "width": 16, "heads": 2, **model})
    config.sampler.update({"solver": "heun", "steps": 2, "cfg_scale": 1.5, "batch_size": 16})
    config.losses = {}
    config.evaluators = {}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with random weights, a grid of samples and scores."""
    workdir = tmp_path_factory.mktemp("exported") / "run"
    leave(workdir, config_of(), 3, 7)
    (workdir / "samples").mkdir()
    save_png(workdir / "samples" / "0000007.png", np.zeros((8, 8, 1), np.uint8))
    (workdir / "evaluations" / "7").mkdir(parents=True)
    record = {"scores": {"frechet_digits": 1.25}, "plan": {"images": {"kind": "run", "step": 7, "sampler": {}}}}
    (workdir / "evaluations" / "7" / "scores.json").write_text(json.dumps(record))
    return workdir


@pytest.fixture(scope="module")
def folder(run):
    out = run.parent / "published"
    convert_checkpoint.publish(run, out)
    return out


def images(source):
    return source.sampler(source.params, source.frozen, source.conditions("balanced", 4, 0), 0)


@pytest.mark.parametrize("weights", ["ema", "online"])
def test_a_published_run_comes_back_to_the_bit(run, tmp_path, weights):
    convert_checkpoint.publish(run, tmp_path / "out", weights)
    before = trained.drawing(trained.of_run(run), weights=weights)
    after = trained.drawing(trained.of_run(tmp_path / "out"), weights=weights)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    assert jax.tree.structure(after.params) == jax.tree.structure(before.params)
    assert after.options == before.options
    assert after.about == before.about | {"step": 7}
    np.testing.assert_array_equal(images(after), images(before))


def test_it_holds_safetensors_and_the_config_of_the_run(run, folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]
    assert (folder / "config.json").read_text() == (run / "config.json").read_text()


def test_its_card_says_what_it_is(run, folder):
    card = (folder / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: diversedit_jax" in front.splitlines()
    assert "- dit" in front.splitlines()
    found = trained.of_run(run)
    count = sum(leaf.size for leaf in jax.tree.leaves(found.load(7)))
    for words in (
        "# published",
        "![samples](samples.png)",
        f"| parameters | {count:,} |",
        "| step | 7, batch size",
        "| evaluate/frechet_digits | 1.25 |",
        "examples [8, 8, 1], 10 classes",
        "--checkpoint=hf:OWNER/NAME",
    ):
        assert words in body, card
    (code,) = (block for block in body.split("```") if block.startswith("python\n"))
    names = {}
    exec(code.removeprefix("python\n").replace("hf:OWNER/NAME", str(folder)), names)
    assert names["images"].shape == (16, 8, 8, 1)


def test_paths_of_this_machine_are_told_and_not_in_the_card(run, tmp_path, capsys):
    config = config_of()
    config.init_from.file = "/home/somebody/repa.pt"
    leave(tmp_path / "run", config, 1)
    convert_checkpoint.publish(tmp_path / "run", tmp_path / "out")
    assert "config.init_from.file = /home/somebody/repa.pt" in capsys.readouterr().out
    assert "somebody" not in (tmp_path / "out" / "README.md").read_text()


def test_what_it_does_not_hold_is_an_error(run, folder, tmp_path):
    found = trained.of_run(folder)
    with pytest.raises(CheckpointError, match=r"no step 3 in .*: it holds step 7"):
        found.load(3)
    with pytest.raises(ConfigError, match="holds the weights 'ema' alone, not 'params'"):
        found.load(7, "online")
    for change, error, words in (
        (
            {"depth": 3},
            UnfitCheckpointError,
            r"does not fit its config.json: 10 of 35 arrays differ; first: deep/ada/bias",
        ),
        ({"name": "my_project.net:make"}, ConfigError, r"runs code outside this package: my_project.net:make \(config"),
    ):
        copy = tmp_path / error.__name__
        copy.mkdir()
        (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        stored = json.loads((folder / "config.json").read_text())
        stored["model"].update(change)
        (copy / "config.json").write_text(json.dumps(stored))
        with pytest.raises(error, match=words):
            trained.of_run(copy).load(7)
    save_file(load_file(folder / "model.safetensors"), copy / "model.safetensors")
    stored["model"]["name"] = "dit"
    (copy / "config.json").write_text(json.dumps(stored))
    with pytest.raises(WeightsError, match=r"was not written by tools\.convert_checkpoint"):
        trained.of_run(copy)
    with pytest.raises(ConfigError, match="is the directory of a run: write to another"):
        convert_checkpoint.publish(run, run)


def test_a_network_of_the_user_comes_back_with_trust(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text("from diversedit_jax.models.dit import make\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of()
    config.model.name = "own_net:make"
    leave(tmp_path / "run", config, 1)
    with pytest.raises(ConfigError, match="--trust_workdir"):
        convert_checkpoint.publish(tmp_path / "run", tmp_path / "out")
    convert_checkpoint.publish(tmp_path / "run", tmp_path / "out", trust=True)
    assert "The config names code outside of the package: own_net:make." in (tmp_path / "out" / "README.md").read_text()
    assert "modules" not in json.loads((tmp_path / "out" / "config.json").read_text())  # folders of this machine
    with pytest.raises(ConfigError, match="--trust_workdir"):
        trained.of_run(tmp_path / "out")
    before, after = (trained.drawing(trained.of_run(tmp_path / name, trust=True)) for name in ("run", "out"))
    np.testing.assert_array_equal(images(after), images(before))


def program(module, *arguments, cwd, hub=None):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(cwd / "home")}
    environment |= {"HF_ENDPOINT": hub.url} if hub else {}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_program_samples_from_a_name_on_the_hub(run, folder, tmp_path):
    with served() as hub:
        hub.add("some/run", folder)
        done = program("diversedit_jax.sample", "--checkpoint=hf:some/run", "--num=4", cwd=tmp_path, hub=hub)
    assert done.returncode == 0, done.stderr
    assert "4 samples of hf:some/run, step 7" in done.stdout
    found = np.load(tmp_path / "run" / "samples_7" / "samples.npz")  # not in the cache
    sample.run(trained.drawing(trained.of_run(run)), num=4, out=tmp_path / "wanted")
    wanted = np.load(tmp_path / "wanted" / "samples.npz")
    # This process has eight devices, that one has one: the last bits may differ, and so one level of 256.
    np.testing.assert_allclose(*(file["arr_0"].astype(int) for file in (found, wanted)), atol=1)


@pytest.mark.slow
def test_the_program_publishes_runs_alone(run, tmp_path):
    done = program("tools.convert_checkpoint", run, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sample from it: python -m diversedit_jax.sample --checkpoint=out" in done.stdout
    refused = program("tools.convert_checkpoint", DATA / "sit_plain.safetensors", "folder", cwd=tmp_path)
    assert refused.returncode == 78
    assert "only a run becomes a folder" in refused.stderr
    assert not (tmp_path / "folder").exists()
