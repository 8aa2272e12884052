"""Videos and volumes from end to end: training, samples, scores, pictures of features."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from diversedit_jax import evaluate, network, sample, train
from diversedit_jax.analysis import pca_maps
from diversedit_jax.api import Conditions, Space
from diversedit_jax.configs import moving_digits
from diversedit_jax.data.moving_digits import CLASSES, SHAPE
from diversedit_jax.data.pipeline import stacked
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import extractors
from diversedit_jax.evaluation.extractors.moving_digits import of_clips
from diversedit_jax.evaluators import SampleSpec, scores
from diversedit_jax.metrics.frechet import frechet_distance, moments
from diversedit_jax.runs import build, trained
from tests import untrained

SPACE = Space(SHAPE, Conditions.labels(40, CLASSES), video=True)
VOLUME = SPACE._replace(video=False)
NUM = 40


def small():
    config = moving_digits.get_config()
    config.update({"total_steps": 4, "batch_size": 8})
    config.model.update({"depth": 4, "width": 16, "heads": 2})
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 20})
    config.samples.update({"every": 2, "num": 4})
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that was never trained."""
    folder = tmp_path_factory.mktemp("run")
    untrained.leave(folder, small(), {8: ("ema",)}, 0.3, SPACE)
    return folder


@pytest.fixture(scope="module")
def source(workdir):
    return trained.drawing(trained.of_run(workdir))


def frames(path):
    with Image.open(path, formats=("GIF",)) as opened:
        return opened.n_frames


def test_every_space_has_a_word_for_its_examples():
    kinds = {(8, 8, 1): "images", (4, 8, 8, 1): "volumes", (8, 1): "1-D examples"}
    assert {shape: Space(shape, Conditions.labels(10)).kind for shape in kinds} == kinds
    assert SPACE.kind == "videos"


def test_samples_are_videos_in_every_file(source, tmp_path):
    sample.run(source, num=3, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"grid.png", "grid.gif", "samples.npz"}
    with np.load(tmp_path / "samples.npz") as file:
        assert (file["arr_0"].shape, file["arr_0"].dtype) == ((3, *SHAPE), np.uint8)
    assert frames(tmp_path / "grid.gif") == 8
    with Image.open(tmp_path / "grid.png") as opened:
        assert opened.height == 3 * 34 + 2, "a row each"


def test_a_volume_has_no_moving_grid(tmp_path):
    config = small()
    config.model.update({"width": 24, "patch": 2, "patch_frames": 1, "attention_axes": "joint", "pairing": "mirror"})
    untrained.leave(tmp_path, config, {8: ("ema",)}, 0.3, VOLUME)
    sample.run(trained.drawing(trained.of_run(tmp_path)), num=3, out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"grid.png", "samples.npz"}


def test_python_gives_videos(workdir):
    found = network.load(workdir).sample(labels=[3, 5])
    assert (found.shape, found.video) == ((2, *SHAPE), True)
    assert "image/gif" in found._repr_html_()
    assert found.names == [CLASSES[3], CLASSES[5]]


def test_videos_are_scored_by_a_network_of_videos(workdir, source, tmp_path):
    judges = evaluate.judges_of(["moving_digits"], [], None, few=True)
    images = evaluate.of_source(source, {}, source.sampler, NUM, None, 0)
    ((_, found),) = evaluate.run(judges, [{}], lambda point: images, tmp_path, keep=True)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "grid.png", "grid.gif", "samples.npz"}
    with np.load(tmp_path / "samples.npz") as file:
        videos = file["arr_0"]
    assert videos.shape == (NUM, *SHAPE)
    one = extractors.make("moving_digits")
    both = (moments(of_clips(x)).gaussian for x in (videos, one.reference()))
    assert found["fd_moving_digits"] == pytest.approx(frechet_distance(*[part for g in both for part in g]), rel=1e-3)
    of_file = evaluate.of_file(tmp_path / "samples.npz", None)
    assert (of_file.shape, of_file.video) == (SHAPE, True)
    ((_, again),) = evaluate.run(judges, [{}], lambda point: of_file, tmp_path / "file")
    assert again == pytest.approx(found, rel=1e-6)  # features in other batches differ in the last bit


def test_a_network_of_images_refuses_videos(workdir):
    spec = SampleSpec.of(build.build(small(), SPACE))
    with pytest.raises(ConfigError, match=r"digits: wanted images \[b 8 8 1\], given \[1, 8, 16, 16, 1\]"):
        scores.make(spec, extractor="digits", num=100)


def test_maps_of_features_stand_beside_as_many_frames(workdir):
    found = trained.of_run(workdir)
    parts = found.experiment.components
    batch = jax.tree.map(np.asarray, stacked([found.data("test").source[i] for i in range(4)]))
    maps = pca_maps.principal(found.experiment, {"params": found.load(8)}, parts.codec.init(), batch, 0.5, count=2)
    side = 3 * 34 + 2  # 8 frames in three columns and rows, 32 pixels each
    assert maps.maps.shape == (4, 2, side, side, 3)
    assert maps.images.shape == (2, side, side, 1)
    seen = maps.images[:, 2:34:2, 2:34:2]
    np.testing.assert_array_equal(seen, np.round((batch["x"][:2, 0] + 1) * 127.5).astype(np.uint8))


@pytest.mark.slow
def test_a_run_of_videos_resumes_and_shows_itself(tmp_path):
    whole = small()
    whole.evaluators.moving_digits.num = 100
    whole.evaluators.scores.update({"num": 100, "few": True})
    train.run(whole, tmp_path / "whole")
    for name in ("samples.gif", "samples/0000002.gif", "samples/0000004.gif"):
        assert frames(tmp_path / "whole" / name) == 8
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "data:image/gif" in page
    assert "for 4 steps of 8 videos." in page
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    found = {name: value for record in records for name, value in record.items()}
    assert found["moving_digits/real/all"] > 0.95
    assert found["moving_digits/frechet_clip"] > found["moving_digits/frechet_clip_floor"]
    assert found["scores/fd_moving_digits"] > 0
    begun = small()
    begun.total_steps, begun.samples.num = 2, 0
    begun.evaluators = type(begun.evaluators)()
    train.run(begun, tmp_path / "parts")
    begun.total_steps = 4
    train.run(begun, tmp_path / "parts")
    ours, theirs = (trained.of_run(tmp_path / name).load(4, "online") for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_a_short_run_learns_to_move_digits(tmp_path):
    config = moving_digits.get_config()
    config.update({"total_steps": 700, "ema_decay": 0.98})
    config.checkpoint.every = config.samples.every = config.evaluators.moving_digits.every = 0
    config.evaluators.moving_digits.num = 100
    del config.evaluators.scores
    train.run(config, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = next(one for one in records if "moving_digits/all" in one)
    assert min(found[f"moving_digits/{name}"] for name in ("digit", "direction", "motion")) > 0.9
