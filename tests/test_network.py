"""Trained networks from Python: open, sample, look inside, score, analyze."""

import base64
import copy
import io
import re

import numpy as np
import pytest
from PIL import Image

import diversedit_jax
from diversedit_jax import evaluate
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.network import Samples
from diversedit_jax.runs import trained
from tests import DATA

LABELS = [3, 5, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run of a few steps, trained from Python."""
    config = digits.get_config()
    config.update({"total_steps": 3, "batch_size": 16})
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 16})
    config.samples.num, config.checkpoint.every = 0, 2
    config.evaluators.digits.num = config.evaluators.scores.num = 110
    return diversedit_jax.train(config, tmp_path_factory.mktemp("run"))


def test_training_returns_the_run(model):
    assert model.step == 3
    assert repr(model).startswith(f"<Network {model.workdir.name}, step 3: ")
    assert repr(model).endswith(" parameters, examples [8, 8, 1], 10 classes>")
    assert model.config.model.width == 16
    again = diversedit_jax.train(model.config, model.workdir)
    np.testing.assert_array_equal(again.params["patch_embed"]["kernel"], model.params["patch_embed"]["kernel"])


def test_samples_are_those_of_the_program(model):
    images = model.sample(labels=LABELS, seed=4, cfg_scale=2.0, steps=3)
    source = trained.drawing(trained.of_run(model.workdir), overrides={"cfg_scale": 2.0, "steps": 3})
    wanted = source.sampler(source.params, source.frozen, np.array(LABELS, np.int32), 4)
    np.testing.assert_array_equal(images, wanted)
    np.testing.assert_array_equal(images.labels, LABELS)
    assert model.sample().shape == (16, 8, 8, 1)
    assert model.sample(labels=7).labels.tolist() == [7]
    assert model.sample(labels=LABELS, num=4).labels.tolist() == [3, 5, 3, 3]
    with pytest.raises(ConfigError, match=r"labels must be in 0 .. 9, given 10"):
        model.sample(labels=[10])
    with pytest.raises(ConfigError, match="option of the sampler = 'stepz' is unknown; did you mean 'steps'"):
        model.sample(stepz=3)


def test_samples_show_themselves_as_a_grid():
    samples = np.zeros((4, 8, 8, 1), np.uint8).view(Samples)
    samples.labels = np.arange(4)
    assert repr(samples) == "<Samples uint8 [4, 8, 8, 1]>"
    image = Image.open(io.BytesIO(samples._repr_png_()), formats=("PNG",))
    assert image.size == (70, 70)
    assert samples[0]._repr_png_() is None
    assert samples.astype(np.float32)._repr_png_() is None
    assert samples[:2].labels is None
    assert samples[::-1].labels is None, "they would be in the wrong order"
    samples.names = ["1", "2", "3", "4"]
    assert Image.open(io.BytesIO(samples._repr_png_()), formats=("PNG",)).size == (70, 102)
    assert float(samples.mean()) == 0


def test_videos_show_themselves_moving():
    samples = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8, 1), dtype=np.uint8).view(Samples)
    assert samples._repr_html_() is None, "a volume does not move"
    assert samples._repr_png_().startswith(b"\x89PNG")
    samples.video = True
    (content,) = re.findall(r'src="data:image/gif;base64,([^"]+)"', samples._repr_html_())
    with Image.open(io.BytesIO(base64.b64decode(content)), formats=("GIF",)) as shown:
        assert (shown.size, shown.n_frames) == ((70, 70), 3)
    assert samples[:2].video
    assert samples[0]._repr_html_() is None
    assert samples.astype(np.float32)._repr_html_() is None
    samples.names = ["1", "2", "3", "4"]
    with Image.open(io.BytesIO(samples._repr_png_()), formats=("PNG",)) as shown:
        assert shown.size[1] == 4 * 34 + 2, "a row each"


def test_features_are_those_of_an_analysis(model):
    images = model.sample(labels=LABELS)
    found = model.features(images, t=0.3, y=images.labels, seed=1)
    assert found.shape == (2, 3, 16, 16)
    np.testing.assert_array_equal(found, model.features(images.astype(np.float32) / 127.5 - 1, 0.3, images.labels, 1))
    assert not np.array_equal(found, model.features(images, t=0.3, seed=1)), "the null condition"
    assert not np.array_equal(found, model.features(images, t=0.6, y=images.labels, seed=1))
    with pytest.raises(ConfigError, match=r"one image is \[4, 8, 1\] to the network, which takes \[8, 8, 1\]"):
        model.features(images[:, :4], t=0.3)


def test_scores_are_those_of_the_program(model, tmp_path):
    scores = model.evaluate(num=110, out=tmp_path / "mine", cfg_scale=1.0, seed=2)
    judges = evaluate.judges_of([], [], str(model.workdir))
    source = trained.drawing(trained.of_run(model.workdir), overrides={"cfg_scale": 1.0})
    ((_, wanted),) = evaluate.run(
        judges, [{}], lambda point: evaluate.of_source(source, point, source.sampler, 110, None, 2), tmp_path / "theirs"
    )
    assert scores == wanted
    assert scores


def test_an_analysis_shows_its_figures(model, tmp_path):
    skipped = ["times", "estimators", "probe", "gradients", "connections", "maps"]
    report = model.analyze(num=16, skip=skipped, out=tmp_path)
    assert report.page == tmp_path / "report.html"
    assert "mean CKA" in repr(report)
    shown = report._repr_html_()
    assert shown.count("<img ") == shown.count("<h2>") == shown.count("<p>") >= 2, "a figure, its title, its caption"
    assert [[look.step for look in one.looks] for one in report.studies] == [[2, 3]]
    early = diversedit_jax.load(model.workdir, step=2).analyze(num=16, skip=skipped, out=tmp_path / "early")
    assert [[look.step for look in one.looks] for one in early.studies] == [[2]]


def test_features_that_need_more_than_images_are_refused(model):
    objective = model._found.experiment.components.objective._replace(reads=("token/dinov2",))
    components = model._found.experiment.components._replace(objective=objective)
    experiment = model._found.experiment._replace(components=components)
    other = copy.copy(model)
    other._found = model._found._replace(experiment=experiment)
    with pytest.raises(ConfigError, match="the network also takes token/dinov2: `analyze` computes its features"):
        other.features(np.zeros((1, 8, 8, 1), np.uint8), t=0.5)


def test_a_release_is_shown_data_of_a_slot():
    data = slot("data", "synthetic", shape=(8, 8, 4))
    found = diversedit_jax.load(DATA / "official_sit.safetensors", family="official_sit", heads=4, data=data)
    assert found.config.data.to_dict() == data.to_dict()
    assert found.config.codec.name == "pixels"
    assert found.step == 0


def test_what_is_no_network_is_refused(tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        diversedit_jax.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="step and online are for a run"):
        diversedit_jax.load(tmp_path / "nowhere.pt", step=3)
    with pytest.raises(AttributeError, match="no attribute 'sample_all'"):
        _ = diversedit_jax.sample_all
