"""Runs on videos and volumes: resumed to the bit, on one device and on eight, and started from a network of images."""

from functools import partial

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diversedit_jax import train
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import moving_digits, solids
from diversedit_jax.data import Dataset
from diversedit_jax.data import moving_digits as videos
from diversedit_jax.runs import trained
from tests.test_train import assert_one_device_is_as_eight, assert_resumed_to_the_bit, losses

KINDS = ("joint", "factorised", "volumes")


def tiny(kind: str) -> ConfigDict:
    """A tiny run with long residuals, the diversity loss, SRA and Dispersive Loss."""
    config = (solids if kind == "volumes" else moving_digits).get_config()
    config.update({"total_steps": 4, "batch_size": 8, "ema_decay": 0.5, "log_every": 1})
    config.model.update({"depth": 4, "width": 24, "heads": 2, "skip": "release"})
    config.losses.sra = slot("losses", "sra", block=1, teacher_block=3, decay_epochs=None)
    config.losses.dispersive = slot("losses", "dispersive", blocks=(2,), groups=2)
    if kind == "factorised":
        config.model.update({"attention_axes": "factorised", "pairing": "same_kind"})
        config.losses.diversity.kinds = 2
    config.optim.warmup_steps = 2
    config.checkpoint.every = config.samples.num = 0
    config.evaluators = ConfigDict()
    return config


def make_frames(split: str) -> Dataset:
    """The first frames of moving digits: images."""
    source = videos.make(split).source
    frames = [{"x": source[i]["x"][0], "y": source[i]["y"]} for i in range(64)]
    return Dataset(frames, None, Space(videos.SHAPE[1:], Conditions.labels(40, videos.CLASSES)))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def straight(kind, tmp_path_factory):
    """A run that nothing disturbed: its directory and final state."""
    workdir = tmp_path_factory.mktemp(kind)
    return workdir, train.run(tiny(kind), workdir)


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_same_to_the_bit(kind, straight, tmp_path):
    assert_resumed_to_the_bit(partial(tiny, kind), straight, tmp_path)


@pytest.mark.slow
def test_one_device_trains_as_eight_do(kind, straight, tmp_path):
    assert_one_device_is_as_eight(f"tests.test_video_runs.tiny({kind!r})", straight, tmp_path)


@pytest.mark.slow
def test_split_parameters_train_as_whole_ones_do(kind, straight, tmp_path):
    config = tiny(kind)
    config.mesh.update({"fsdp": 2, "tensor": 2})
    train.run(config, tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(straight[0]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["joint", "factorised"])
def test_a_network_of_images_goes_on_on_videos(axes, tmp_path):
    images = tiny("joint")
    images.data, images.losses = slot("data", "tests.test_video_runs:make_frames"), ConfigDict()
    images.model.skip_init = "identity"
    train.run(images, tmp_path / "images")
    config = tiny("joint")
    config.losses = ConfigDict()
    config.model.update({"attention_axes": axes, "positions": "learned_frames", "skip_init": "identity"})
    if axes == "factorised":
        config.model.update({"depth": 8, "pairing": "same_kind"})
    config.init_from.update({"file": str(tmp_path / "images"), "trust": True})
    config.update({"total_steps": 1})
    config.optim.update({"learning_rate": 1e-30})
    train.run(config, tmp_path / "videos")

    def network(name):
        found = trained.of_run(tmp_path / name, trust=True)
        return found.experiment.components.model, found.load(found.last, "ema")

    (of_images, was), (of_videos, now) = network("images"), network("videos")
    x = jax.random.normal(jax.random.key(0), (2, *videos.SHAPE))
    x = x if axes == "factorised" else x[:, :1] + 0 * x  # a still video, where all frames see each other
    t, y = np.float32([0.3, 0.8]), np.int32([3, 40])
    wanted = [jax.jit(of_images.apply)(was, x[:, frame], t, y)[0] for frame in range(videos.FRAMES)]
    found = jax.jit(of_videos.apply)(now, x, t, y)[0]
    np.testing.assert_allclose(found, np.stack(wanted, axis=1), atol=1e-5 * float(np.abs(found).max()))
