"""The photographs that other packages bundle: cut without a connection, a class each, the same every time."""

import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diversedit_jax.data import image_collections
from diversedit_jax.errors import ConfigError
from tools.studies import photographs

SIZE, EACH = 16, 4
CLASSES = sorted(photographs.PHOTOGRAPHS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four crops of each photograph, cut where no connection can be opened."""
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", None)
        assert photographs.write(folder, SIZE, EACH * len(CLASSES) + 3) == EACH * len(CLASSES)
    return folder


def test_the_photographs_are_a_class_each_and_the_same_every_time(photos, tmp_path):
    images = image_collections.open_images(photos)
    assert list(images.classes) == CLASSES
    np.testing.assert_array_equal(np.bincount(images.labels), EACH)
    written = files(photos)
    assert len(set(written.values())) == len(written), "two crops are the same"
    photographs.write(tmp_path, SIZE, EACH * len(CLASSES))
    assert files(tmp_path) == written


def test_crops_are_of_their_photograph_in_its_colours(photos):
    """On average over a photograph's crops its colour, within what the place of four crops changes."""
    for name in ("brick", "grass", "tissue"):  # much the same everywhere
        wanted = np.asarray(photographs.photograph(name)).mean(axis=(0, 1))
        crops = np.stack([np.asarray(Image.open(file)) for file in sorted((photos / name).iterdir())])
        assert crops.shape == (EACH, SIZE, SIZE, 3)
        np.testing.assert_allclose(crops.mean(axis=(0, 1, 2)), wanted, atol=12)


def test_photographs_that_cannot_be_written_are_refused_in_one_line(photos, tmp_path, monkeypatch):
    for out, size, num, words in [
        (tmp_path / "a", 0, 64, "--size = 0: must be at least 1"),
        (tmp_path / "a", 16, 15, "--num = 15: must be at least 16"),
        (photos, 16, 64, "is not an empty folder"),
        (photos / "cat/0000.png", 16, 64, "is not an empty folder"),
    ]:
        with pytest.raises(ConfigError, match=words):
            photographs.write(out, size, num)
    assert not (tmp_path / "a").exists()
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "cat", ("skimage", "data/dog.png"))
    with pytest.raises(ConfigError, match=r"cat is a picture of skimage, but .*dog.png is missing"):
        photographs.photograph("cat")
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "cat", ("no_such_package", "data/cat.png"))
    with pytest.raises(ConfigError, match="no_such_package, which is not installed: pip install"):
        photographs.photograph("cat")
