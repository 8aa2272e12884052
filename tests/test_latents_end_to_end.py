"""From photographs and videos to decoded samples, by the programs and in small: prepare, verify, train, sample."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from diversedit_jax import sample, train
from diversedit_jax.configs import photos
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import vae
from diversedit_jax.runs import trained
from diversedit_jax.weights import vae as published
from tools import prepare_latents
from tools.studies import photo_vae, photographs


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Crops of photographs, a small autoencoder of them, their latents."""
    home = tmp_path_factory.mktemp("photos")
    assert photographs.write(home / "images", 16, 64) == 64
    photo_vae.train(home / "images", home / "vae", size=16, steps=3)
    prepare_latents.prepare(home / "images", home / "latents", prepare_latents.Options(str(home / "vae"), size=16))
    prepare_latents.verify(home / "latents", home / "vae", "highest")
    return home


def config_of(home):
    config = photos.get_config()
    config.data.data_dir, config.codec.vae = str(home / "latents"), str(home / "vae")
    config.model.update({"depth": 2, "width": 32, "heads": 2, "remat": "none"})
    config.update({"total_steps": 4, "batch_size": 16, "log_every": 1})
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 16})
    config.samples.update({"every": 0, "num": 16})
    return config


@pytest.mark.slow  # its links are tested one by one: test_prepare_latents, test_vae, test_train, test_sampling
def test_the_whole_chain_ends_in_pictures(latents, tmp_path):
    config = config_of(latents)
    train.run(config, tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss/total"] for record in steps if "loss/total" in record]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.mode == "RGB"
    with np.load(sample.run(trained.drawing(trained.of_run(tmp_path)), num=16) / "samples.npz") as found:
        pictures, labels = found["arr_0"], found["labels"]
    assert (pictures.shape, pictures.dtype) == ((16, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(labels, np.arange(16))

    # From a run that knows of no autoencoder the same samples are latents, and these pictures once they are decoded.
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["codec"]["vae"] = None
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with np.load(
        sample.run(trained.drawing(trained.of_run(tmp_path)), num=16, out=tmp_path / "undecoded") / "samples.npz"
    ) as found:
        x = found["arr_0"]
    assert (x.shape, x.dtype) == ((16, 4, 4, 4), np.float32)
    release = published.open_vae(latents / "vae")
    decoded = jax.jit(vae.network(release.arch).decode)(release.read(("decoder",)), x / config.codec.scale)
    wanted = np.floor(np.clip(127.5 * np.asarray(decoded) + 128, 0, 255))
    assert np.abs(pictures - wanted).max() <= 1  # rounding of a sum in another order
    assert np.mean(pictures != wanted) < 1e-3

    # Latents of another scale are refused. (Here, because another process would make all of the above once more.)
    config = config_of(latents)
    config.codec.update({"scale": 1.0, "vae": None})
    with pytest.raises(ConfigError, match=r"codec.scale = 1.0, but the autoencoder of these latents has 0.18215"):
        train.run(config, tmp_path)


@pytest.mark.slow
def test_videos_end_in_videos(latents, tmp_path):
    """Clips of a moving window on photographs, whose autoencoder is that of single images."""
    for kind in ("cat", "coffee"):
        for number, crop in enumerate(photographs.crops(kind, 32, 8)):
            moving = [Image.fromarray(np.roll(crop, 2 * frame, axis=1)[:16, :16]) for frame in range(9)]
            (tmp_path / "videos" / kind).mkdir(parents=True, exist_ok=True)
            moving[0].save(
                tmp_path / "videos" / kind / f"{number}.webp", save_all=True, append_images=moving[1:], lossless=True
            )
    options = prepare_latents.Options(str(latents / "vae"), size=16, frames=4, interval=2)
    prepare_latents.prepare(tmp_path / "videos", tmp_path / "latents", options)
    config = config_of(latents)
    config.data.data_dir = str(tmp_path / "latents")
    config.samples.num = 2
    train.run(config, tmp_path / "run")
    run = trained.of_run(tmp_path / "run")
    assert run.space.video
    with np.load(sample.run(trained.drawing(run), num=2) / "samples.npz") as found:
        assert (found["arr_0"].shape, found["arr_0"].dtype) == ((2, 4, 16, 16, 3), np.uint8)


def test_crops_are_the_same_every_time():
    first, again = (photographs.crops("cat", 8, 3) for _ in range(2))
    assert [np.asarray(a).tolist() for a in first] == [np.asarray(b).tolist() for b in again]
    assert len({np.asarray(crop).tobytes() for crop in first}) == 3
