"""Volumes in .npy files: values, classes, splits, mirrors; and files that are damaged or do not fit are named."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import codecs, data
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError, DataError

ITEMS = {"ant/a": 0, "ant/deep/b": 1, "bee/a": 2, "bee/c": 3}


def volume(number, shape=(4, 5, 6)):
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def write(path, change=lambda array: array):
    """Four volumes in two classes."""
    for name, number in ITEMS.items():
        save(path / f"{name}.npy", change(volume(number)))
    return path


def opened(path, split="train", **options):
    return data.make("volumes", split, data_dir=str(path), **options)


def test_volumes_have_the_classes_of_their_folders(tmp_path):
    dataset = opened(write(tmp_path))
    assert (dataset.space.shape, dataset.space.video) == ((4, 5, 6, 1), False)
    assert dataset.space.conditions.names == ("ant", "bee")
    assert [int(dataset.source[i]["y"]) for i in range(4)] == [0, 0, 1, 1]
    assert dataset.transform is None
    for i in range(4):
        x = dataset.source[i]["x"]
        assert x.dtype == np.float32
        np.testing.assert_allclose(x[..., 0], volume(i) / 127.5 - 1, atol=1e-6)
    batch = next(pipeline.batches(dataset, 8, seed=0, num_threads=0))
    assert batch["x"].shape == (8, 4, 5, 6, 1)
    assert opened(tmp_path, unconditional=True).space.conditions.classes == 0


def test_pixels_decode_a_volume(tmp_path):
    dataset = opened(write(tmp_path))
    codec = codecs.make("pixels")
    x = jnp.stack([dataset.source[i]["x"] for i in range(4)])
    np.testing.assert_array_equal(codec.decode({}, x)[..., 0], np.stack([volume(i) for i in range(4)]))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda array: array > 127, {}),
        (lambda array: array[..., None].repeat(3, axis=-1), {}),
        (lambda array: np.asfortranarray(array), {}),
        (lambda array: (array / 127.5 - 1).astype(np.float16), {}),
        (lambda array: (array / 127.5 - 1).astype(">f4"), {}),
        (lambda array: array * 10.0 - 1000, {"low": -1000.0, "high": 1550.0}),
        (lambda array: array.astype(np.int16) - 100, {"low": -100.0, "high": 155.0}),
        (lambda array: (array > 127).astype(np.uint8), {"low": 0.0, "high": 1.0}),
    ],
    ids=["bool", "channels", "fortran", "float16", "big endian", "float64", "int16", "uint8 0 1"],
)
def test_numbers_of_any_type_become_values(change, options, tmp_path):
    x = opened(write(tmp_path, change), **options).source[2]["x"]
    changed = change(volume(2))
    binary = changed.max() == 1 and changed.min() == 0
    wanted = np.where(volume(2) > 127, 1, -1) if binary else volume(2) / 127.5 - 1
    assert x.shape == (4, 5, 6, changed.shape[3] if changed.ndim == 4 else 1)
    np.testing.assert_allclose(x, np.broadcast_to(wanted[..., None], x.shape), atol=1e-3)


def test_values_beyond_the_limits_that_are_given_are_cut_off(tmp_path):
    x = opened(write(tmp_path), low=100.0, high=200.0).source[0]["x"][..., 0]
    np.testing.assert_allclose(x, np.clip((volume(0) - 150.0) / 50, -1, 1), atol=1e-6)


def test_folders_of_splits(tmp_path):
    write(tmp_path / "train")
    save(tmp_path / "test" / "ant" / "z.npy", volume(9))
    assert len(opened(tmp_path).source) == 4
    assert len(opened(tmp_path, "test").source) == 1
    with pytest.raises(DataError, match=r"volumes: .* has no split 'val'; its folders: test, train"):
        opened(tmp_path, "val")


def test_mirror_images_are_drawn_along_the_axes_that_are_named(tmp_path):
    dataset = opened(write(tmp_path), mirror=(0, 2))
    example = dataset.source[0]
    draws = [dataset.transform(example, np.random.default_rng(i)) for i in range(100)]
    assert all(draw["y"] == example["y"] for draw in draws)
    wanted = {np.flip(example["x"], axes).tobytes(): axes for axes in ((), (0,), (2,), (0, 2))}
    counts = [sum(draw["x"].tobytes() == one for draw in draws) for one in wanted]
    assert sum(counts) == 100
    assert min(counts) > 10


def test_options_that_mean_nothing_are_refused(tmp_path):
    write(tmp_path)
    for options, words in [
        ({"low": 0.0}, r"low = 0.0 and high = None: give both or neither"),
        ({"low": 1.0, "high": 1.0}, r"volumes: high = 1.0: must be more than 1"),
        ({"mirror": (3,)}, r"mirror = \(3,\): wanted different axes of 0, 1, 2"),
        ({"mirror": (1, 1)}, r"mirror = \(1, 1\): wanted different axes"),
    ]:
        with pytest.raises(ConfigError, match=words):
            opened(tmp_path, **options)
    with pytest.raises(DataError, match=r"volumes: .*nowhere is not a folder"):
        opened(tmp_path / "nowhere")
    save(tmp_path / "z.npy", volume(0))
    with pytest.raises(DataError, match=r"volumes in folders \(ant\) and beside them \(z.npy\): give each volume"):
        opened(tmp_path)
    assert len(opened(tmp_path, unconditional=True).source) == 5


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (volume(0, (4, 5)), r"its shape is \[4, 5\]: wanted \[d h w\] or \[d h w c\]"),
        (volume(0, (4, 0, 6)), r"its shape is \[4, 0, 6, 1\]: wanted"),
        (volume(0, (4, 5, 7)), r"its shape is \[4, 5, 7, 1\], that of volume 0 is \[4, 5, 6, 1\]"),
        (volume(0).astype(np.int16), r"holds int16 from \d+ to \d+: give low and high"),
        (volume(0).astype(np.float32), r"reach from \d+.0 to \d+.0, not -1 to 1: give low and high"),
        ((volume(0) > 127).astype(np.uint8), r"reach from 0 to 1, not 0 to 255: give low and high"),
        (np.full((4, 5, 6), np.nan), r"numbers that are not finite"),
        (np.full((4, 5, 6), 1j), r"it holds complex128: wanted numbers"),
        (np.full((4, 5, 6), "a"), r"it holds <U1: wanted numbers"),
    ],
)
def test_a_volume_that_does_not_fit_is_named(array, words, tmp_path):
    save(write(tmp_path) / "bee" / "b.npy", array)
    source = opened(tmp_path).source
    with pytest.raises(DataError, match=rf"{tmp_path}/bee/b.npy: .*{words}") as error:
        source[3]
    assert "\n" not in str(error.value)


def test_damaged_volumes_are_named_or_replaced(tmp_path):
    file = write(tmp_path) / "bee" / "a.npy"
    file.write_bytes(file.read_bytes()[:-1])
    dataset = opened(tmp_path)
    lines = []
    loader = pipeline.batches(dataset, 4, seed=0, num_threads=0, max_bad_records=1, report=lines.append)
    assert next(loader)["x"].shape == (4, 4, 5, 6, 1)
    assert len(lines) == 1
    assert "bee/a.npy: it is truncated" in lines[0]
    file.unlink()
    with pytest.raises(DataError, match=r"bee/a.npy: cannot be read: No such file"):
        next(pipeline.batches(dataset, 4, seed=0, num_threads=0))
    os.mkfifo(file)
    assert len(opened(tmp_path).source) == 3, "reading a pipe might never end"
