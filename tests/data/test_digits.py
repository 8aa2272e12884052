"""The digits: built once and whole, split without overlap, scaled and dequantised as written."""

import subprocess
import sys

import numpy as np
import pytest

from diversedit_jax import data
from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import digits
from diversedit_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory in which the digits are built."""
    directory = tmp_path_factory.mktemp("digits")
    digits.build(directory)
    return directory


def run(program: str, directory) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-W", "error", "-c", program, str(directory)], stdout=-1, stderr=-1)


def test_the_splits_hold_every_digit_once(built):
    from sklearn.datasets import load_digits

    (train, train_labels), (test, test_labels) = digits.levels("train", built), digits.levels("test", built)
    both = np.concatenate([train, test]).reshape(-1, 64)
    labels = np.concatenate([train_labels, test_labels])
    given = load_digits()
    rows = [row.tobytes() + bytes([y]) for row, y in zip(both, labels, strict=True)]
    wanted = [row.astype(np.uint8).tobytes() + bytes([y]) for row, y in zip(given.data, given.target, strict=True)]
    assert sorted(rows) == sorted(wanted)
    assert (len(train), len(test)) == (1437, 360)
    assert (train.dtype, train.min(), train.max()) == (np.uint8, 0, 16)


def test_no_held_out_image_is_trained_on(built):
    train, test = (digits.levels(split, built)[0] for split in ("train", "test"))
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_the_split_is_stratified_and_fixed(built):
    train, test = (np.bincount(digits.levels(split, built)[1]) for split in ("train", "test"))
    np.testing.assert_allclose(test / (train + test), 360 / 1797, atol=0.004)
    labels = np.repeat(np.arange(10), 180)[:1797]
    np.testing.assert_array_equal(digits.held_out(labels), digits.held_out(labels))


def test_examples_are_scaled_to_minus_one_and_one(built):
    dataset = data.make("digits", "test", data_dir=str(built))
    levels, labels = digits.levels("test", built)
    example = dataset.source[7]
    np.testing.assert_array_equal(example["x"], levels[7].astype(np.float32) / 8 - 1)
    assert (example["x"].dtype, example["x"].shape) == (np.float32, (8, 8, 1))
    assert (example["y"], example["y"].dtype) == (labels[7], np.int32)
    assert (len(dataset.source), dataset.space) == (360, Space((8, 8, 1), Conditions.labels(10)))


def test_dequantisation_is_uniform_over_one_level(built):
    dataset = data.make("digits", "train", data_dir=str(built))
    example, rng = dataset.source[0], np.random.default_rng(0)
    before = example["x"].copy()
    noise = np.stack([dataset.transform(example, rng)["x"] - before for _ in range(500)]) * 8
    assert noise.dtype == np.float32
    assert np.abs(noise).max() <= 0.5 + 1e-6
    np.testing.assert_allclose([noise.mean(), noise.var()], [0, 1 / 12], atol=5e-3)
    np.testing.assert_array_equal(example["x"], before, "the transform changed the stored example")


def test_without_dequantisation_nothing_is_drawn(built):
    assert data.make("digits", "train", data_dir=str(built), dequantize=False).transform is None


def test_an_unknown_split_is_a_config_error(built):
    with pytest.raises(ConfigError, match="split = 'val' is unknown; known: train, test"):
        data.make("digits", "val", data_dir=str(built))


def test_the_cache_directory_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(data.make("digits", "test").source) == 360
    assert (tmp_path / "diversedit_jax" / "digits" / "1.0.0" / "dataset_info.json").is_file()


@pytest.mark.slow
def test_two_processes_may_build_at_the_same_time(tmp_path):
    program = """if True:
        import sys
        from diversedit_jax.data import digits
        print(int(digits.levels("train", sys.argv[1])[0].astype(int).sum()))
    """
    builds = [run(program, tmp_path) for _ in range(2)]
    answers = [build.communicate(timeout=120) for build in builds]
    assert answers[0][0].strip().isdigit(), answers
    assert answers[0] == answers[1]
    assert answers[0][1] == b"", "building is silent"
    assert [entry.name for entry in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_the_later_of_two_builds_uses_the_earlier_files(tmp_path, monkeypatch):
    generate = digits.Digits._split_generators

    def slow(self, dl_manager):  # another build finishes while this one is under way
        monkeypatch.setattr(digits.Digits, "_split_generators", generate)
        first = digits.build(tmp_path)
        (first / "winner").touch()
        return generate(self, dl_manager)

    monkeypatch.setattr(digits.Digits, "_split_generators", slow)
    assert (digits.build(tmp_path) / "winner").exists()
    assert len(digits.levels("test", tmp_path)[1]) == 360


@pytest.mark.slow
def test_a_killed_build_is_not_taken_for_a_whole_one(tmp_path):
    program = """if True:
        import os, sys
        from pathlib import Path
        from diversedit_jax.data import digits
        def half(self, data, rows):
            yield from list(generate(self, data, rows))[:100]
            os._exit(9)
        generate, digits.Digits._generate_examples = digits.Digits._generate_examples, half
        digits.build(Path(sys.argv[1]))
    """
    killed = run(program, tmp_path)
    killed.communicate(timeout=120)
    assert killed.returncode == 9
    assert list((tmp_path / "digits").glob("building-*")), "the build was killed before it wrote anything"
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(digits.levels("train", tmp_path)[1]) == 1437


@pytest.mark.parametrize("harm", ["truncate", "remove", "no metadata"])
def test_damaged_files_are_named(tmp_path, harm):
    place = digits.build(tmp_path)
    shard = place / "digits-train.array_record-00000-of-00001"
    if harm == "truncate":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        (shard if harm == "remove" else place / "dataset_info.json").unlink()
    with pytest.raises(DataError, match=rf"{place} is damaged .*delete it"):
        digits.levels("train", tmp_path)


def test_a_place_that_cannot_be_written_is_a_config_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to data_dir"):
        digits.levels("train", tmp_path / "file")


def test_synthetic_examples_repeat_and_are_not_zeros():
    train, again, test = (
        data.make("synthetic", split, shape=(4, 4, 2), size=1000) for split in ("train",) * 2 + ("test",)
    )
    x = np.stack([train.source[i]["x"] for i in range(256)])
    y = np.array([train.source[i]["y"] for i in range(1000)])
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=0.05)
    assert (x.dtype, y.dtype, len(train.source)) == (np.float32, np.int32, 1000)
    assert train.space == Space((4, 4, 2), Conditions.labels(1000))
    assert 0 <= y.min() < 50 < 950 < y.max() < 1000
    np.testing.assert_array_equal(train.source[999]["x"], again.source[999]["x"])
    assert not np.array_equal(train.source[0]["x"], test.source[0]["x"])
    for options, wanted in (({"size": 0}, 1), ({"shape": (0, 4, 4)}, 1), ({"num_classes": -1}, 0)):
        (option,) = options
        with pytest.raises(ConfigError, match=rf"synthetic: {option} = (0|-1): must be at least {wanted}"):
            data.make("synthetic", "train", **options)
    with pytest.raises(ConfigError, match=r"split = 'val' is unknown; known: train, test"):
        data.make("synthetic", "val")
    assert data.make("synthetic", "train", shape=(2, 4, 4, 1), video=True).space.video
    with pytest.raises(ConfigError, match=r"a video has shape \(f, h, w, c\), given \(4, 4, 1\)"):
        data.make("synthetic", "train", shape=(4, 4, 1), video=True)
