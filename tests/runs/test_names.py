"""Wherever a file of weights is wanted, a name on the hub does: here, names whose files are already downloaded."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import analyze, data, encoders, train
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.evaluation import extractors
from diversedit_jax.evaluation.reference_statistics import open_reference
from diversedit_jax.runs import build, trained
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights import hub, inception, vae
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tests import DATA

PLACES = {
    "hf:some/vae": DATA / "vae",
    "hf:some/vae:diffusion_pytorch_model.safetensors": DATA / "vae" / "diffusion_pytorch_model.safetensors",
    "hf:some/dinov2@v1:dinov2.safetensors": DATA / "dinov2.safetensors",
    "hf:some/sit": DATA / "sit_diversedit.safetensors",
}


@pytest.fixture
def names(monkeypatch):
    """Names on the hub, and their paths. The test may add to them."""
    places = dict(PLACES)
    monkeypatch.setattr(hub, "_downloaded", lambda name: Path(places[name]))
    return places


@pytest.mark.parametrize("name", [name for name in PLACES if "vae" in name])
def test_an_autoencoder(names, name):
    found, wanted = vae.open_vae(name), vae.open_vae(PLACES[name])
    assert (found.name, found.scale, found.digest) == (name, wanted.scale, wanted.digest)
    jax.tree.map(np.testing.assert_array_equal, found.read(), wanted.read())


def test_an_encoder_and_a_feature_network(names):
    name = "hf:some/dinov2@v1:dinov2.safetensors"
    found, wanted = (encoders.make("dinov2", file=str(file), heads=2) for file in (name, PLACES[name]))
    jax.tree.map(np.testing.assert_array_equal, found.init(), wanted.init())
    about = [extractors.make("dinov2", file=str(file), heads=2).about["weights"] for file in (name, PLACES[name])]
    assert about[0]["digest"] == about[1]["digest"]
    with pytest.raises(ConfigError, match=rf"inception: {PLACES[name]}: the array .* is missing"):
        inception.open_inception(name)  # this is another network
    with pytest.raises(WeightsError, match="is not a classifier that"):
        extractors.make("small_resnet", file=name)


def test_statistics(names, tmp_path):
    names["hf:some/stats:m.npz"] = tmp_path / "m.npz"
    np.savez(tmp_path / "m.npz", mu=np.zeros(2), sigma=np.eye(2))
    found = open_reference("hf:some/stats:m.npz")
    assert found.about["name"] == "m.npz"
    np.testing.assert_array_equal(found.by_network["inception"].pool[1], np.eye(2))


def test_a_release(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = trained.drawing(trained.of_release("hf:some/sit", heads=4), overrides={"steps": 2})
    wanted = releases.open_release(DATA / "sit_diversedit.safetensors", heads=4)[0].params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(source.params), wanted)
    assert (source.name, source.about["file"]) == ("hf:some/sit", "hf:some/sit")
    assert source.folder == tmp_path / "samples_sit"  # not in the cache
    assert analyze.named("label=hf:some/sit") == ("label", Path("hf:some/sit"))


def test_the_digest_of_what_a_run_reads_is_that_of_the_file(names):
    config = digits.get_config()
    dataset = data.make("digits", "train")
    found = []
    for file in ("hf:some/vae", str(PLACES["hf:some/vae"])):
        config.codec = slot("codecs", "vae", vae=file)
        found.append(build.inputs(config, dataset))
    assert found[0] == found[1]
    assert len(found[0]["codec.vae"]) == 16


@pytest.mark.slow
def test_a_run_that_starts_from_a_name_stores_it_and_resumes(names, tmp_path):
    dims = {"depth": 2, "width": 16, "heads": 2}
    arch = releases.Architecture(**dims, patch=2, channels=1, out_channels=1, num_classes=10)
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), releases.abstract(arch))
    names["hf:some/digits:sit.safetensors"] = tmp_path / "sit.safetensors"
    write_safetensors(tmp_path / "sit.safetensors", releases.export(params, "sit", arch, (8, 8)))
    config = digits.get_config()
    config.update({"total_steps": 1, "batch_size": 16})
    config.model.update(dims | {"skip": "none"})
    config.samples.num, config.losses, config.evaluators = 0, ConfigDict(), ConfigDict()
    config.init_from.update({"file": "hf:some/digits:sit.safetensors", "heads": 2})
    train.run(config, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["init_from"]["file"] == "hf:some/digits:sit.safetensors"
    config.total_steps = 2
    assert int(train.run(config, tmp_path / "run")["step"]) == 2
