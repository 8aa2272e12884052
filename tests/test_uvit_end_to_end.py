"""U-ViT from training to analysis and to a file in its authors' layout: steps, continuous times, text."""

import json
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from diversedit_jax import analyze, evaluate, sample, train
from diversedit_jax.analysis.measure import Settings
from diversedit_jax.config import slot
from diversedit_jax.configs import uvit as recipe
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import trained
from diversedit_jax.weights import dit as releases
from tests import ROOT, captioned, test_train, untrained, whole_clip
from tests.data import test_captioned_latents
from tests.test_train import assert_one_device_is_as_eight, assert_resumed_to_the_bit, losses, records
from tools import convert_checkpoint

NUM = {"steps": 110, "continuous": 110, "text": 40}  # scored samples: digits have 96 features, texts 64 held-out images
KINDS = {"steps": "h2,diversedit", "continuous": "l2,diversedit_const", "text": "coco,diversedit"}
FAMILIES = {"steps": "uvit_discrete", "continuous": "uvit", "text": "uvit_discrete"}


def tiny(kind: str, **changes) -> ConfigDict:
    """A tiny run with the objective, losses, optimizer and sampler of the recipe; `changes` by dotted key."""
    config = captioned.config() if kind == "text" else test_train.tiny()
    given = recipe.get_config(KINDS[kind])
    config.model = given.model
    config.model.update({"size": "S", "depth": 4, "width": 32, "heads": 2, "patch": 2, "dtype": "float32"})
    config.objective, config.losses, config.optim = given.objective, given.losses, given.optim
    config.losses.diversity.groups, config.optim.warmup_steps = 2, 2
    config.update({"total_steps": 4, "ema_decay": 0.5})
    config.sampler.update({"solver": "dpm_solver_pp", "steps": 4, "cfg_scale": given.sampler.cfg_scale})
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def judge(kind, tmp_path_factory):
    """The evaluator of a run."""
    if kind != "text":
        return slot("evaluators", "scores", extractor="digits", num=NUM[kind])
    clip = whole_clip.leave(tmp_path_factory.mktemp("clip") / "whole", captioned.encoder())
    return slot("evaluators", "scores", extractor="clip", file=str(clip), num=NUM[kind], labels="shuffled")


@pytest.fixture(scope="module")
def straight(kind, judge, tmp_path_factory):
    """A run that nothing disturbed: its directory and final state."""
    workdir, config = tmp_path_factory.mktemp(kind), tiny(kind)
    config.evaluators.scores = judge
    return workdir, train.run(config, workdir)


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_same_to_the_bit(kind, straight, tmp_path):
    assert_resumed_to_the_bit(partial(tiny, kind), straight, tmp_path)


@pytest.mark.slow
def test_one_device_trains_as_eight_do(kind, straight, tmp_path):
    assert_one_device_is_as_eight(f"tests.test_uvit_end_to_end.tiny({kind!r})", straight, tmp_path)


@pytest.mark.slow
def test_its_scores_are_those_of_the_program(kind, straight, tmp_path):
    workdir, _ = straight
    logged = {name: value for one in records(workdir) for name, value in one.items() if name.startswith("scores/")}
    source = trained.drawing(trained.of_run(workdir, trust=True))
    judges = evaluate.judges_of([], [], str(workdir), trust=True)
    rule = "shuffled" if kind == "text" else "balanced"
    images = evaluate.of_source(source, {}, source.sampler, NUM[kind], rule, 0)
    ((_, scores),) = evaluate.run(judges, [{}], lambda point: images, tmp_path, False)
    found = {name: value for name, value in scores.items() if f"scores/{name}" in logged}
    assert found
    assert found == pytest.approx({name: logged[f"scores/{name}"] for name in found}, rel=1e-4)
    assert all(map(np.isfinite, found.values()))


@pytest.mark.slow
def test_it_is_analysed(kind, straight, tmp_path):
    workdir, _ = straight
    assert all(np.isfinite(one["diversity/weight"]) for one in records(workdir) if "loss/total" in one)
    opened = trained.of_run(workdir, losses=True, trust=True)
    (study,) = analyze.run([opened], tmp_path, Settings(num=32, batch=16), times=(0.05, 0.5))
    assert study.connections.pairs == ((2, 4), (1, 5))
    assert study.maps.maps.shape[0] == 5
    assert study.pulls["diversity"].ratio[0] > 0
    assert json.loads((tmp_path / "analysis.json").read_text())["diversity"]


@pytest.fixture(scope="module")
def released(kind, straight, tmp_path_factory):
    """The trained weights as a file under the names of U-ViT's code, by the program."""
    file = tmp_path_factory.mktemp("released") / "uvit.safetensors"
    command = ["-m", "tools.convert_checkpoint", straight[0], file, "--trust_workdir", "--online"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{FAMILIES[kind]}, " in done.stdout
    return file


@pytest.mark.slow
def test_a_file_of_its_authors_layout_samples_as_the_run_does(kind, straight, released, tmp_path):
    assert {"mid_block.attn.qkv.weight", "out_blocks.1.skip_linear.weight"} <= load_file(released).keys()
    opened = trained.of_run(straight[0], trust=True)
    options = {"steps": 4, "cfg_scale": 1.4, "solver": "dpm_solver_pp", "batch_size": 16}
    text = {"text_encoder": str(captioned.encoder()), "sides": 8} if kind == "text" else {}
    found = trained.of_release(released, FAMILIES[kind], 2, **text)
    y = sample.conditions(trained.drawing(opened, overrides=options), 4, 0)
    assert found.experiment.config.codec.scale == (0.2301 if kind == "text" else 0.18215)
    ours = trained.drawing(opened, overrides=options)
    params = opened.load(opened.last, "online")
    theirs = trained.drawing(found, overrides=options)
    wanted = ours.sampler(params, ours.frozen, y, 0).astype(np.float32)  # of 256 levels
    latents = theirs.sampler(theirs.params, theirs.frozen, y, 0)
    np.testing.assert_allclose(np.clip(np.round((latents + 1) * 127.5), 0, 255), wanted, atol=1)
    assert wanted.std() > 1
    if kind == "text":
        with np.load(sample.run(theirs, prompts=["a red bus", ""], out=tmp_path) / "samples.npz") as file:
            assert file["arr_0"].shape == (2, 8, 8, 3)


@pytest.mark.slow
def test_a_run_starts_from_a_file_of_its_authors_layout(kind, straight, released, tmp_path):
    config = tiny(kind, total_steps=1, optim__learning_rate=1e-30, optim__weight_decay=0.0)
    config.init_from.update({"file": str(released), "family": FAMILIES[kind], "heads": 2})
    state = train.run(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, state["params"], straight[1]["params"])
    release, _ = convert_checkpoint.of_run(tmp_path / "run", "online", trust=True)
    arrays = releases.export(release.params, release.family, release.arch)
    for name, array in load_file(released).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.slow
def test_the_recipe_trains_on_folders_of_its_authors_scripts(tmp_path):
    config, given = tiny("text", total_steps=2), recipe.get_config("coco,stored")
    config.data, config.codec, config.text_encoder = given.data, given.codec, None
    config.data.update({"data_dir": str(test_captioned_latents.uvit(tmp_path / "set")), "kind": "logvar"})
    config.model.patch = 3
    train.run(config, tmp_path / "run")
    assert all(map(np.isfinite, losses(tmp_path / "run").values()))
    found = trained.of_run(tmp_path / "run")
    assert found.experiment.config.codec.scale == 0.2301
    source = trained.drawing(found)
    latents = source.sampler(source.params, source.frozen, sample.conditions(source, 4, 0), 0)
    assert (latents.shape, latents.dtype) == ((4, 3, 6, 4), np.float32)


def test_connections_that_no_release_has_are_refused(tmp_path):
    untrained.leave(tmp_path, tiny("steps", model__skip="paper"), {1: ("ema",)}, scale=0.1)
    with pytest.raises(ConfigError, match=r"model.skip = 'paper' with skip_init = None: no release has such skips"):
        convert_checkpoint.of_run(tmp_path)
