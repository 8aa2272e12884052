"""Preparing latents of videos: a record for each clip, with the moments of its frames, as for images."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diversedit_jax import codecs, data, encoders
from diversedit_jax.codecs.vae import mean_encoder
from diversedit_jax.data import videos
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.models import vae
from diversedit_jax.runtime.files import write_json
from diversedit_jax.weights import vae as published
from tests.data.test_videos import folder_of_frames, frames, moving_picture, tar, write
from tests.tools.test_prepare_latents import ARCH, SIZE, content, killed_and_run_again, small_encoder
from tools import latent_shards, prepare_latents
from tools.prepare_latents import Options

FRAMES, INTERVAL, PER_SHARD = 3, 2, 2
# name -> number of frames; three frames with one left out between two of them are a clip: 6 begin the next one
VIDEOS = {"run/a": 12, "run/b.webp": 4, "run/c": 5, "walk/d.webp": 11, "walk/e": 9, "walk/f.webp": 5}
CLIPS = {"run/a#0": 0, "run/a#1": 6, "run/c#0": 0, "walk/d.webp#0": 0, "walk/d.webp#1": 6, "walk/f.webp#0": 0}


def crops(key: str) -> np.ndarray:
    """The crops of a clip, uint8 [f size size 3]."""
    name, first = key.partition("#")[0], CLIPS[key]
    video = frames(list(VIDEOS).index(name), VIDEOS[name])[first : first + FRAMES * INTERVAL : INTERVAL]
    return np.stack([videos.CROPS["adm"](Image.fromarray(frame), SIZE) for frame in video])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Videos of two classes, of which one is too short and one is damaged, and an autoencoder."""
    home = tmp_path_factory.mktemp("home")
    for number, (name, count) in enumerate(VIDEOS.items()):
        make = moving_picture if name.endswith(".webp") else folder_of_frames
        make(home / "videos" / name, frames(number, count))
    (home / "videos/walk/e/frame4.png").write_text("<html>not found</html>")
    published.export(jax.jit(vae.network(ARCH).init)(jax.random.key(0)), ARCH, home / "vae", scale=0.5)
    return home


def prepare(home, out, source="videos", **options):
    given = {"vae": str(home / "vae"), "size": SIZE, "per_shard": PER_SHARD, "batch_size": 8}
    given |= {"frames": FRAMES, "interval": INTERVAL} | options
    prepare_latents.prepare(home / source, out, Options(**given))
    return out


@pytest.fixture(scope="module")
def straight(home):
    """The set of a run that nothing disturbed."""
    return prepare(home, home / "straight")


@pytest.fixture(scope="module")
def encoded(home):
    """image or images -> their moments."""
    network, params = vae.network(ARCH), published.open_vae(home / "vae").read()
    encode = jax.jit(network.encode)
    return lambda images: encode(params, images.astype(np.float32) / 127.5 - 1)


def test_a_record_has_the_moments_of_the_frames_of_a_clip_and_of_their_mirror_images(straight, encoded):
    dataset = data.make("latents", "train", data_dir=str(straight), mirror=True)
    assert dataset.space.shape == (FRAMES, 8, 8, 4)
    assert dataset.space.video
    assert (dataset.space.conditions.classes, dataset.scale) == (2, 0.5)
    assert len(dataset.source) == len(CLIPS)
    for row, key in enumerate(CLIPS):
        example, clip = dataset.source[row], crops(key)
        assert example["y"] == int(key.startswith("walk"))
        assert example["moments"].shape == (2, FRAMES, 8, 8, 8)
        for found, wanted in zip(example["moments"], (clip, clip[:, :, ::-1]), strict=True):
            np.testing.assert_allclose(found, encoded(wanted), rtol=2e-3, atol=2e-3)  # float16
    whole = dataset.source[0]
    versions = [dataset.transform(whole, np.random.default_rng(seed))["moments"] for seed in range(8)]
    drawn = {[np.array_equal(one, version) for one in whole["moments"]].index(True) for version in versions}
    assert drawn == {0, 1}, "all frames are mirrored, or none"
    plain = data.make("latents", "train", data_dir=str(straight))
    np.testing.assert_array_equal(plain.source[3]["moments"], dataset.source[3]["moments"][0])


def test_the_way_back_decodes_each_frame_as_an_image(home, straight):
    dataset = data.make("latents", "train", data_dir=str(straight))
    codec = codecs.make("vae", scale=0.5, vae=str(home / "vae"), chunk=2)
    stored = {name: jnp.stack([dataset.source[row][name] for row in range(4)]) for name in ("moments", "y")}
    x = codec.encode(codec.init(), stored, jax.random.key(0))["x"]
    assert codecs.network_space(codec, dataset.space).video
    assert x.shape == (4, FRAMES, 8, 8, 4)
    mean, std = np.split(np.asarray(stored["moments"], np.float32), 2, axis=-1)
    noise = (x / 0.5 - mean) / std
    assert abs(np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]) < 0.1  # of 1024 numbers: 3 deviations
    decode = jax.jit(codec.decode)
    found = np.asarray(decode(codec.init(), x))
    assert (found.shape, found.dtype) == ((4, FRAMES, SIZE, SIZE, 3), np.uint8)
    for frame in range(FRAMES):
        np.testing.assert_array_equal(found[:, frame], decode(codec.init(), x[:, frame]))


def test_frames_are_stored_for_encoders_and_so_are_their_features(home, tmp_path):
    file, out = small_encoder(tmp_path), tmp_path / "out"
    prepare(home, out, image="png", encoder=(f"dinov2={file},heads=2,side=16",))
    options = {"data_dir": str(out), "image": True, "cached": ("features/dinov2",)}
    dataset = data.make("latents", "train", mirror=True, **options)
    encoder = encoders.make("dinov2", file=str(file), heads=2, side=16)
    tokens = jax.jit(partial(encoders.tokens, encoder))
    for row, key in enumerate(CLIPS):
        example, clip = dataset.source[row], crops(key)
        np.testing.assert_array_equal(example["image"], clip)
        features, none = tokens(encoder.init(), np.stack([clip, clip[:, :, ::-1]]))
        assert none is None
        np.testing.assert_allclose(example["features/dinov2"], features, rtol=2e-3, atol=2e-3)  # float16
    drawn = [dataset.transform(example, np.random.default_rng(seed)) for seed in range(8)]
    for one in drawn:
        mirrored = np.array_equal(one["moments"], example["moments"][1])
        np.testing.assert_array_equal(one["image"], clip[:, :, ::-1] if mirrored else clip)
        np.testing.assert_array_equal(one["features/dinov2"], example["features/dinov2"][int(mirrored)])
    np.testing.assert_array_equal(data.make("latents", "train", **options).source[row]["image"], clip)
    with pytest.raises(DataError, match="no feature 'token/dinov2'"):
        data.make("latents", "train", data_dir=str(out), cached=("token/dinov2",))
    prepare_latents.verify(out, home / "vae", "highest")
    with Image.open(out / "verified.png") as picture, Image.open(out / "mosaic.png") as mosaic:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(mosaic))


def test_videos_that_are_given_become_latents_frame_by_frame(home, encoded):
    clips = np.stack([crops(key) for key in ("run/a#0", "run/c#0")])
    x = mean_encoder(str(home / "vae"), 0.5, 0.25, chunk=2)(clips)
    wanted = np.stack([(np.split(encoded(clip), 2, axis=-1)[0] - 0.25) * 0.5 for clip in clips])
    np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5)  # another order of sums


def test_the_report_and_the_picture_show_what_became_of_the_videos(home, straight, capsys):
    report = json.loads((straight / "report.json").read_text())
    assert (report["videos"], report["videos_read"], report["records"]) == (6, 4, 6)
    assert report["per_class"] == {"run": 2, "walk": 2}
    assert report["skipped"] == {
        "run/b.webp": "4 frames, and the shortest clip takes 5",
        "walk/e": "frame 4: not an image that can be decoded: cannot identify image file",
    }
    about = latent_shards.whole(straight)
    found = {key: about[key] for key in ("shape", "video", "interval", "windows", "videos", "records")}
    assert found == {
        "shape": [FRAMES, 8, 8, 4],
        "video": True,
        "interval": INTERVAL,
        "windows": "all",
        "videos": 6,
        "records": 6,
    }
    with Image.open(straight / "mosaic.png") as mosaic:
        shown = np.asarray(mosaic)[::6, ::6]
    first, last = (np.concatenate(list(crops(key)), axis=1) for key in ("run/a#0", "walk/f.webp#0"))
    np.testing.assert_array_equal(shown[:SIZE], np.concatenate([first, last], axis=1))
    prepare_latents.verify(straight, home / "vae", "highest")
    says = capsys.readouterr().out
    assert "is whole: 6 records in 3 shards" in says
    assert "PSNR of the reconstructions of 6 images: " in says


def test_the_summary_counts_clips_and_videos(home, tmp_path, capsys):
    prepare(home, tmp_path, windows="first")
    says = capsys.readouterr().out
    assert "4 clips of 4 of 6 videos in 3 shards" in says
    assert "skipped: run/b.webp: 4 frames, and the shortest clip takes 5" in says
    records = [latents[0] for latents in content(tmp_path) if latents]
    assert records[0] == content(home / "straight")[0][0]


def test_processes_share_the_work_and_make_the_same_set(home, straight, tmp_path):
    for index in (1, 0):
        prepare(home, tmp_path, process_index=index, process_count=2)
    assert content(tmp_path) == content(straight)


def test_what_is_done_is_not_done_again(home, straight, tmp_path, monkeypatch):
    def breaks(folder, plan, shard, records, *counts):
        if shard == 1:
            raise KeyboardInterrupt
        return write(folder, plan, shard, records, *counts)

    write = latent_shards.write_shard
    monkeypatch.setattr(latent_shards, "write_shard", breaks)
    with pytest.raises(KeyboardInterrupt):
        prepare(home, tmp_path)
    first = tmp_path / "latents-train.array_record-00000-of-00003"
    before = first.stat().st_mtime_ns
    monkeypatch.undo()
    prepare(home, tmp_path)
    assert first.stat().st_mtime_ns == before
    assert content(tmp_path) == content(straight)
    with pytest.raises(ConfigError, match=r"holds a set with other settings \(.*interval: 2 there, 1 given"):
        prepare(home, tmp_path, interval=1)


def command(home, out):
    arguments = [home / "videos", out, f"--vae={home / 'vae'}", "--size=16", "--per_shard=1", "--batch_size=3"]
    flags = [f"--frames={FRAMES}", f"--interval={INTERVAL}", "--windows=all"]
    return [sys.executable, "-m", "tools.prepare_latents", *map(str, arguments), *flags]


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_set(home, tmp_path):
    killed_and_run_again(home, tmp_path, 2, command)


def test_a_clip_may_be_longer_than_a_batch(home, straight, tmp_path):
    prepare(home, tmp_path, batch_size=2)
    for found, wanted in zip(content(tmp_path), content(straight), strict=True):
        for pair in zip(found, wanted, strict=True):
            one, other = (
                np.frombuffer(latent_shards.latents.parsed(record)["moments"].bytes_list.value[0], np.float16)
                for record in pair
            )
            np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3)  # float16; the batch moves the last bits


def test_tar_files_and_video_files_become_latents(home, tmp_path, encoded):
    video = frames(0, 7)
    file = write(tmp_path / "a.mp4", video).read_bytes()
    tar(home / "tars" / "0.tar", {"a.mp4": file, "a.cls": b"1"})
    dataset = data.make("latents", "train", data_dir=str(prepare(home, tmp_path / "out", "tars")))
    assert (len(dataset.source), dataset.source[0]["y"], dataset.space.conditions.classes) == (1, 1, 2)
    clip = np.stack([videos.CROPS["adm"](Image.fromarray(frame), SIZE) for frame in video[:5:2]])
    np.testing.assert_allclose(dataset.source[0]["moments"], encoded(clip), rtol=2e-3, atol=2e-3)  # float16


def test_what_cannot_work_is_said_at_once(home, tmp_path):
    for options, words in [
        ({"frames": -1}, "--frames = -1: must be at least 1"),
        ({"interval": 0}, "--interval = 0: must be at least 1"),
        ({"frames": 0}, "--interval and --windows are for videos: give --frames, the number of frames of a clip"),
        ({"tokenizer": "clip"}, "--tokenizer is for images, and --frames for videos: give one of them"),
        ({"captions": "file.csv"}, "--captions is for images, and --frames for videos"),
        ({"kind": "zip"}, "videos: kind = 'zip' is unknown; known: folder, tar"),
    ]:
        with pytest.raises(ConfigError, match=words):
            prepare(home, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"run/b.webp: 4 frames, and the shortest clip takes 5"):
        prepare(home, tmp_path / "out", strict=True)
    with pytest.raises(DataError, match=r"none of 6 videos could be read; see report.json"):
        prepare(home, tmp_path / "none", interval=20)


def test_a_first_axis_that_is_no_time_is_not_called_so(straight, tmp_path):
    about = json.loads((straight / "latents.json").read_text())
    for file in straight.iterdir():
        if file.is_file() and file.name != "latents.json":
            (tmp_path / file.name).symlink_to(file)
    write_json(tmp_path / "latents.json", about | {"video": False})
    assert not data.make("latents", "train", data_dir=str(tmp_path)).space.video
    write_json(tmp_path / "latents.json", about | {"video": "yes"})
    with pytest.raises(DataError, match=r"latents.json says video = 'yes' of latents \[3, 8, 8, 4\]"):
        data.make("latents", "train", data_dir=str(tmp_path))
