"""Fashion-MNIST, MNIST and CIFAR-10 from small files in their published layouts, and images that lie on the devices."""

import contextlib
import gzip
import hashlib
import io
import os
import struct
import tarfile

import jax
import numpy as np
import pytest

from diversedit_jax import codecs, data
from diversedit_jax.data import cifar10, fashion, levels, pipeline
from diversedit_jax.errors import ConfigError, DataError
from tests.data import test_image_collections

COUNT = 6


def idx(array):
    """An array of bytes in the format idx."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """A folder as Fashion-MNIST's, with six images in each split; half of the files are packed."""
    rng = np.random.default_rng(0)
    sums, arrays = {}, {}
    for split, (name, _) in fashion.SPLITS.items():
        parts = rng.integers(256, size=(COUNT, 28, 28), dtype=np.uint8), np.arange(COUNT, dtype=np.uint8)
        contents = [idx(part) for part in parts]
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(contents[0]))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(contents[1])
        sums[split], arrays[split] = tuple(hashlib.md5(content).hexdigest() for content in contents), parts
    monkeypatch.setattr(fashion, "SPLITS", {split: (name, COUNT) for split, (name, _) in fashion.SPLITS.items()})
    monkeypatch.setattr(fashion, "MD5", {"Fashion-MNIST": sums, "MNIST": fashion.MD5["MNIST"]})
    return tmp_path, arrays


@pytest.mark.parametrize("split", ["train", "test"])
def test_clothes_are_read_with_their_border_and_labels(split, clothes):
    folder, arrays = clothes
    dataset = data.make("fashion", split, data_dir=str(folder))
    images, labels = arrays[split]
    assert dataset.space.shape == (32, 32, 1)
    assert dataset.space.conditions.classes == 10
    assert dataset.transform is None
    for i in range(COUNT):
        x, y = dataset.source[i]["x"], dataset.source[i]["y"]
        assert (x.dtype, y) == (np.float32, labels[i])
        np.testing.assert_array_equal(x[2:-2, 2:-2, 0], np.float32(images[i]) / 127.5 - 1)
        assert x.sum() == pytest.approx(x[2:-2, 2:-2].sum() - (32**2 - 28**2))


def test_images_shrink_to_the_means_of_their_pixels(clothes):
    folder, _ = clothes
    whole = data.make("fashion", "train", data_dir=str(folder)).source.images.astype(float)
    for size in (16, 8):
        dataset = data.make("fashion", "train", data_dir=str(folder), size=size)
        k = 32 // size
        means = whole.reshape(COUNT, size, k, size, k, 1).mean(axis=(2, 4))
        assert dataset.space.shape == (size, size, 1)
        assert np.abs(dataset.source.images - means).max() <= 0.5
    with pytest.raises(ConfigError, match=r"fashion: size = 12 is unknown; .* 32, 16, 8"):
        data.make("fashion", "train", data_dir=str(folder), size=12)


def test_clothes_that_are_missing_damaged_or_others_are_refused(clothes, tmp_path):
    folder, _ = clothes
    with pytest.raises(ConfigError, match=r"fashion: split = 'val' is unknown; .* train, test"):
        data.make("fashion", "val", data_dir=str(folder))
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist"):
        data.make("fashion", "train", data_dir=str(tmp_path / "nowhere"))
    labels = folder / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\1")
    with pytest.raises(
        DataError, match=r"neither Fashion-MNIST nor MNIST: md5 of its train images and labels: \w{32} "
    ):
        data.make("fashion", "train", data_dir=str(folder))
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte has 13 bytes, wanted 14"):
        data.make("fashion", "train", data_dir=str(folder))
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(DataError, match=r"images-idx3-ubyte.gz has more than 4720 bytes, wanted 4720"):
        data.make("fashion", "train", data_dir=str(folder))
    packed.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"cannot read .*images-idx3-ubyte.gz: Error -3"):
        data.make("fashion", "train", data_dir=str(folder))
    packed.unlink()
    os.mkfifo(packed)
    with pytest.raises(DataError, match=r"cannot read .*: .*is not a regular file"):
        data.make("fashion", "train", data_dir=str(folder))


def photographs(count):
    """Records of CIFAR-10's binary version: (bytes, images [n 32 32 3], labels)."""
    rng = np.random.default_rng(count)
    planes = rng.integers(256, size=(count, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(10, size=count, dtype=np.uint8)
    content = b"".join(bytes([label]) + plane.tobytes() for label, plane in zip(labels, planes, strict=True))
    return content, planes.transpose(0, 2, 3, 1), labels


@pytest.mark.parametrize("layout", ["archive", "beside", "inside", "files"])
def test_photographs_are_read_from_the_archive_and_from_its_files(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "COUNT", COUNT)
    content, images, labels = photographs(COUNT)
    names = [name for names in cifar10.SPLITS.values() for name in names]
    path = tmp_path
    if layout in ("inside", "files"):
        folder = tmp_path / cifar10.FOLDER
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(content)
        path = folder if layout == "files" else tmp_path
    else:
        with tarfile.open(tmp_path / cifar10.ARCHIVE, "w:gz") as archive:
            for name in ["readme.html", *names]:
                info = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        path = tmp_path / cifar10.ARCHIVE if layout == "archive" else tmp_path
        with pytest.raises(DataError, match=rf"its md5 is \w{{32}}, and that of {cifar10.ARCHIVE} is {cifar10.MD5}"):
            data.make("cifar10", "train", data_dir=str(path))
        monkeypatch.setattr(cifar10, "MD5", hashlib.md5((tmp_path / cifar10.ARCHIVE).read_bytes()).hexdigest())
    dataset = data.make("cifar10", "test", data_dir=str(path))
    np.testing.assert_array_equal(dataset.source.images, images)
    np.testing.assert_array_equal(dataset.source.labels, labels)
    assert len(data.make("cifar10", "train", data_dir=str(path)).source) == 5 * COUNT
    assert data.make("cifar10", "train", data_dir=str(path), size=16).space.shape == (16, 16, 3)


def test_photographs_that_are_missing_or_damaged_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "COUNT", COUNT)
    with pytest.raises(DataError, match=r"has neither cifar-10-binary.tar.gz nor the files in it"):
        data.make("cifar10", "test", data_dir=str(tmp_path))
    content, _, _ = photographs(COUNT)
    (tmp_path / "test_batch.bin").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"test_batch.bin has 18437 bytes, wanted 18438"):
        data.make("cifar10", "test", data_dir=str(tmp_path))
    (tmp_path / "test_batch.bin").write_bytes(b"\x0b" + content[1:])
    with pytest.raises(DataError, match=r"record 0 of test has the label 11: wanted 0 .. 9"):
        data.make("cifar10", "test", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"has no data_batch_1.bin"):
        data.make("cifar10", "train", data_dir=str(tmp_path))


def test_images_of_a_folder_are_decoded_once_to_the_same_values(tmp_path):
    test_image_collections.folder(tmp_path / "set")
    slow = data.make("images", "train", data_dir=str(tmp_path / "set"), size=8)
    fast = data.make("images", "train", data_dir=str(tmp_path / "set"), size=8, in_memory=True)
    assert isinstance(fast.source, levels.Levels)
    for i in range(len(slow.source)):
        jax.tree.map(np.testing.assert_array_equal, slow.source[i], fast.source[i])


@pytest.mark.parametrize("mirror", [False, True])
def test_examples_on_the_device_are_those_of_the_host(mirror, clothes):
    """The same order, the same mirror images, the same bits, from any batch on."""
    dataset = data.make("fashion", "train", data_dir=str(clothes[0]), mirror=mirror)
    codec = codecs.resident(codecs.make("pixels"), dataset.source)
    frozen = codec.init()
    encode = jax.jit(lambda frozen, batch: codecs.encoded(codec, frozen, batch, jax.random.key(0)))
    with (
        contextlib.closing(pipeline.batches(dataset, 4, 0, 3, num_threads=0)) as host,
        contextlib.closing(pipeline.batches(dataset, 4, 0, 3, num_threads=0, resident=True)) as numbers,
    ):
        for _ in range(4):
            wanted, given = next(host), next(numbers)
            assert given.keys() == ({"number", "mirrored"} if mirror else {"number"})
            found = encode(frozen, given)
            for name in ("x", "y"):
                np.testing.assert_array_equal(found[name], wanted[name])
            whole = encode(frozen, wanted)  # as evaluators give them
            np.testing.assert_array_equal(whole["x"], wanted["x"])


def test_data_that_cannot_lie_on_the_devices_are_refused():
    dataset = data.make("synthetic", "train", shape=(8, 8, 1), num_classes=3, size=64)
    with pytest.raises(ConfigError, match=r"config.input.resident: only data in memory .*`fashion`, `cifar10`, "):
        pipeline.batches(dataset, 4, 0, resident=True)
