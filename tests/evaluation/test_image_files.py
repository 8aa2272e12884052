"""Finished images: every file that holds them gives the same ones, and what holds none is refused in one line."""

import io
import os
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from diversedit_jax.errors import ConfigError, DataError, MachineError
from diversedit_jax.evaluation.image_files import open_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)


def npy(path, images=IMAGES):
    np.save(path / "samples.npy", images)
    return path / "samples.npy"


def stored(path, images=IMAGES):
    np.savez(path / "samples.npz", images, labels=np.arange(7))
    return path / "samples.npz"


def compressed(path, images=IMAGES):
    np.savez_compressed(path / "samples.npz", images)
    return path / "samples.npz"


def fortran(path, images=IMAGES):
    return stored(path, np.asfortranarray(images))


def large(path):
    """A member with the long fields of zip64, as one of more than 4 GB has."""
    with zipfile.ZipFile(path / "samples.npz", "w") as file, file.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, IMAGES, version=(2, 0))
    return path / "samples.npz"


def folder(path):
    """Names whose order is neither that of their making nor that of the numbers in them."""
    path = path / "samples"
    path.mkdir()
    for name, image in reversed(list(zip(["0", "1", "10", "11", "2", "a", "b"], IMAGES, strict=True))):
        Image.fromarray(image).save(path / f"{name}.png")
    return path


def archive(path):
    with tarfile.open(path / "samples.tar", "w") as file:
        file.add(folder(path), "samples")
    return path / "samples.tar"


@pytest.mark.parametrize("write", [npy, stored, compressed, fortran, large, folder, archive])
def test_every_file_gives_the_same_images(write, tmp_path):
    found = open_samples(write(tmp_path))
    assert (found.count, found.shape) == (7, (4, 6, 3))
    for first, count in ((0, 7), (0, 3), (3, 3), (6, 1), (5, 9)):
        images = found.read(first, count)
        assert (type(images), images.dtype) == (np.ndarray, np.uint8)
        np.testing.assert_array_equal(images, IMAGES[first : first + count])


@pytest.mark.parametrize("write", [npy, stored])
def test_what_is_not_compressed_is_mapped(write, tmp_path):
    """What changes in the file changes in the images: none of it was read before."""
    path = write(tmp_path)
    found = open_samples(str(path))
    content = path.read_bytes()
    place = content.index(IMAGES.tobytes())
    with open(path, "r+b") as file:
        file.seek(place + IMAGES[0].size)
        file.write(bytes(IMAGES[1].size))
    np.testing.assert_array_equal(found.read(0, 2), [IMAGES[0], np.zeros_like(IMAGES[1])])


def test_one_channel_stays_one_channel(tmp_path):
    found = open_samples(stored(tmp_path, IMAGES[..., :1]))
    assert found.shape == (4, 6, 1)
    np.testing.assert_array_equal(found.read(0, 7), IMAGES[..., :1])


def test_videos_are_read_like_images(tmp_path):
    videos = np.stack([IMAGES[:3], IMAGES[3:6]])
    found = open_samples(stored(tmp_path, videos))
    assert (found.count, found.shape) == (2, (3, 4, 6, 3))
    np.testing.assert_array_equal(found.read(1, 5), videos[1:])


def refused(path, words, kind=DataError):
    with pytest.raises(kind, match=words) as error:
        open_samples(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


NAN = np.where(np.arange(7)[:, None, None, None] == 3, np.nan, IMAGES / 255).astype(np.float32)


@pytest.mark.parametrize("write", [npy, stored, compressed])
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES.astype(np.float32), r"arr_0 is float32 \[7, 4, 6, 3\]: wanted uint8 \[n h w 3\]"),
        (NAN, r"arr_0 is float32 \[7, 4, 6, 3\]: wanted uint8"),
        (IMAGES.astype(np.int64), r"arr_0 is int64 \[7, 4, 6, 3\]: wanted uint8"),
        (IMAGES.transpose(0, 3, 1, 2), r"arr_0 is uint8 \[7, 3, 4, 6\]: wanted the channels last, uint8 \[n h w 3\]"),
        (IMAGES[0], r"arr_0 is uint8 \[4, 6, 3\]: wanted uint8 \[n h w 3\]"),
        (IMAGES[:, :, :, :2], r"arr_0 is uint8 \[7, 4, 6, 2\]: wanted uint8"),
        (IMAGES[:0], r"arr_0 is uint8 \[0, 4, 6, 3\]: wanted uint8"),
        (np.uint8(3), r"arr_0 is uint8 \[\]: wanted uint8"),
        (np.array([{}]), "cannot be read: .*[Oo]bject"),
    ],
)
def test_other_arrays_are_refused(write, images, words, tmp_path):
    refused(write(tmp_path, images), words)


def test_an_npz_without_the_array_says_what_it_holds(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=np.arange(7))
    refused(tmp_path / "a.npz", "no array arr_0, it holds images, labels")
    zipfile.ZipFile(tmp_path / "b.npz", "w").close()
    refused(tmp_path / "b.npz", "no array arr_0, it holds nothing")


def test_damaged_files_are_refused(tmp_path):
    def cut(write, size):
        path = write(tmp_path)
        path.write_bytes(path.read_bytes()[:size])
        return path

    refused(cut(stored, 400), "not an .npz file: truncated")
    refused(cut(compressed, 400), "not an .npz file: truncated")
    refused(cut(stored, 0), "not an .npz file: empty")
    refused(cut(npy, 400), "cannot be read: ")
    refused(cut(npy, 20), "cannot be read: ")
    refused(cut(npy, 0), "cannot be read: ")
    (tmp_path / "page.npz").write_text("<!DOCTYPE html>\n<p>Sign in</p>")
    refused(tmp_path / "page.npz", r"not an .npz file: begins with b'<!DOCTYPE html>\\n<p>Sign '")
    stored(tmp_path).rename(tmp_path / "zip.npy")
    refused(tmp_path / "zip.npy", "cannot be read: .*magic string")
    npy(tmp_path).rename(tmp_path / "array.npz")
    refused(tmp_path / "array.npz", r"not an .npz file: begins with b.\\x93NUMPY")


def test_a_damaged_byte_is_refused_or_read_and_nothing_else(tmp_path):
    """No damage is a traceback: a program ends with one line."""
    rng, errors, read = np.random.default_rng(0), [], 0
    for write in (stored, compressed):
        path = write(tmp_path, IMAGES[:2, :2, :2])
        whole = path.read_bytes()
        for place in rng.permutation(len(whole))[:150]:
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.integers(8)
            path.write_bytes(changed)
            try:
                found = open_samples(path)
                assert found.read(0, 1).shape == (1, *found.shape)
                read += 1
            except DataError as error:
                errors.append(str(error))
    assert min(read, len(errors)) > 20
    assert all(error.startswith(f"{path}: ") and error.isprintable() for error in errors)


def test_an_array_longer_than_its_file_is_refused(tmp_path):
    """The zip's directory says that all is there; the array's own header says more."""
    header, content = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 8, 8, 3)})
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("arr_0.npy", header.getvalue() + bytes(64))
    (tmp_path / "long.npz").write_bytes(content.getvalue())
    refused(tmp_path / "long.npz", "cannot be read: it is truncated")


def test_images_of_two_sizes_are_named(tmp_path):
    path = folder(tmp_path)
    Image.new("RGB", (5, 4)).save(path / "10.png")
    found = open_samples(path)
    with pytest.raises(DataError, match=r"10.png has 4 x 5 pixels, 0.png 4 x 6 pixels: wanted images of one size") as e:
        found.read(0, 7)
    assert str(path) in str(e.value)
    np.testing.assert_array_equal(found.read(0, 2), IMAGES[:2])


def test_a_damaged_image_is_named(tmp_path):
    path = folder(tmp_path)
    (path / "11.png").write_bytes((path / "11.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"samples: 11.png: not an image that can be decoded"):
        open_samples(path).read(0, 7)
    (path / "0.png").write_text("")
    refused(path, "0.png: an empty file")


def test_what_is_no_file_of_images_is_refused(tmp_path):
    refused(tmp_path / "nowhere.npz", "samples: .* does not exist")
    refused(tmp_path, "holds no images")
    refused("gs://bucket/samples.npz", "samples: gs://bucket/samples.npz is not a path of this machine", ConfigError)
    Image.fromarray(IMAGES[0]).save(tmp_path / "one.png")
    refused(tmp_path / "one.png", "is neither an .npz with arr_0 nor a folder, .tar or .zip of images")
    (tmp_path / "folder.npz").mkdir()
    refused(tmp_path / "folder.npz", "a folder, wanted a file .npz")


def test_a_digest_is_of_the_content(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    digests = []
    for name, array in (("a", images), ("b", images), ("c", images[::-1])):
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
        digests.append(open_samples(tmp_path / f"{name}.npz").digest())
    assert digests[0] == digests[1] != digests[2]
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
        digests.append(open_samples(folder).digest())
    assert digests[3] != digests[4]


@pytest.mark.parametrize("write", [stored, compressed])
def test_no_flipped_bit_goes_into_a_score(write, tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    for place in whole.index(b"arr_0.npy") + np.random.default_rng(0).integers(50, 500, 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        refused(path, "cannot be read: ")


def test_a_pipe_is_refused(tmp_path):
    for name in ("a.npz", "a.npy"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is not a regular file")


def test_a_machine_without_threads_is_not_taken_for_damage(tmp_path, monkeypatch):
    found = open_samples(folder(tmp_path))

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(MachineError, match="can't start new thread"):
        found.read(0, 7)
