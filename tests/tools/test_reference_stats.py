"""The tool that makes references: statistics of all images, features of some, and what other tools read in them."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diversedit_jax.data import image_collections
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.evaluation import reference_statistics, scoring
from diversedit_jax.evaluation.extractors import Extractor, Features
from tests import ROOT
from tools import reference_stats

COUNT, SIZE = 21, 8


def network(name="inception"):
    def apply(weights, images):
        pool = images.reshape(len(images), -1)[:, :12] * weights
        return Features(pool, pool[:, :5])

    return Extractor(name, lambda: np.float32(1 / 255), apply, {"weights": {"digest": "ab"}}, chunk=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs of several sizes in two classes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        image = Image.fromarray(rng.integers(0, 256, (9 + number, 20, 3), dtype=np.uint8))
        (folder / f"class{number % 2}").mkdir(exist_ok=True)
        image.save(folder / f"class{number % 2}" / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def crops(folder):
    opened = image_collections.open_images(folder)
    return np.stack([image_collections.crop(opened, index, SIZE) for index in range(COUNT)])


def made(folder, out, networks=None, features=7, stored=0, num=None):
    images = reference_stats.collection(folder, SIZE, num, None, None, 2)
    networks = networks or [network()]
    arrays = reference_stats.compute(images, networks, 16, features, stored)
    about = images.about | {"extractors": {one.name: dict(one.about) for one in networks}}
    reference_stats.write(out, arrays, about)
    return out


def test_statistics_are_of_all_images_and_features_of_some(folder, crops, tmp_path):
    out = made(folder, tmp_path / "ref.npz", stored=4)
    pool = crops.reshape(COUNT, -1)[:, :12].astype(np.float64) / 255
    with np.load(out, allow_pickle=False) as file:
        assert set(file.files) == {"mu", "sigma", "mu_s", "sigma_s", "features", "arr_0", "about"}
        np.testing.assert_allclose(file["mu"], pool.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(file["sigma"], np.cov(pool, rowvar=False), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(file["sigma_s"], np.cov(pool[:, :5], rowvar=False), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(file["features"], pool[::3], rtol=1e-6)
        np.testing.assert_array_equal(file["arr_0"], crops[[0, 5, 10, 15]])
    opened = reference_statistics.open_reference(out)
    assert opened.by_network["inception"].digest == "ab"
    assert opened.about["made"]["size"] == [SIZE, SIZE]


def test_other_networks_stand_below_their_names(folder, tmp_path):
    out = made(folder, tmp_path / "ref.npz", [network(), network("toy")], features=0)
    with np.load(out) as file:
        assert set(file.files) == {
            *("mu", "sigma", "mu_s", "sigma_s", "about"),
            *(f"toy/{name}" for name in ("mu", "sigma", "mu_s", "sigma_s")),
        }
    assert reference_statistics.open_reference(out).by_network.keys() == {"inception", "toy"}


def test_a_part_of_a_collection_is_evenly_spread(folder, crops, tmp_path):
    assert reference_stats.chosen(21, 4).tolist() == [0, 5, 10, 15]
    assert reference_stats.chosen(3, 4).tolist() == [0, 1, 2]
    with np.load(made(folder, tmp_path / "ref.npz", num=3)) as file:
        np.testing.assert_allclose(file["features"], crops[[0, 7, 14]].reshape(3, -1)[:, :12] / 255, rtol=1e-6)


def test_an_npz_of_images_is_taken_as_it_is(crops, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=crops)
    with np.load(made(tmp_path / "images.npz", tmp_path / "ref.npz", features=COUNT)) as file:
        np.testing.assert_allclose(file["features"], crops.reshape(COUNT, -1)[:, :12] / 255, rtol=1e-6)
        assert json.loads(str(file["about"]))["crop"] is None


def test_a_damaged_image_is_named_and_nothing_is_written(folder, tmp_path):
    (tmp_path / "images").mkdir()
    for path in sorted(folder.glob("*/*.png"))[:5]:
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "images" / "02.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"02.png: not an image"):
        made(tmp_path / "images", tmp_path / "ref.npz")
    assert not (tmp_path / "ref.npz").exists()


@pytest.mark.slow
def test_as_a_program(folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "tools.reference_stats", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    tiny = f"dinov2={ROOT / 'tests' / 'data' / 'dinov2.safetensors'},heads=4,side=28"
    out = tmp_path / "new" / "ref.npz"
    code, said = run(folder, out, f"--extractor={tiny}", "--size=32", "--batch_size=8")
    assert code == 0, said
    assert "21 images of" in said
    assert reference_statistics.open_reference(out).by_network["dinov2"].features.shape == (21, 48)
    assert run(folder, tmp_path / "ref.txt", f"--extractor={tiny}") == (
        78,
        f"error: OUT must end in .npz, given {tmp_path / 'ref.txt'}\n",
    )


def test_an_npz_that_is_not_square_keeps_its_shape(tmp_path):
    """It is written down, and samples of that shape are compared."""
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images)
    np.save(tmp_path / "images.npy", images)
    for name in ("images.npz", "images.npy"):
        opened = reference_statistics.open_reference(made(tmp_path / name, tmp_path / "ref.npz"))
        assert opened.about["made"]["size"] == [4, 6]
        scoring.check_reference([network()], [opened], (4, 6, 3))
        with pytest.raises(ConfigError, match="samples have 4 x 4 pixels, the reference is of 4 x 6 pixels"):
            scoring.check_reference([network()], [opened], (4, 4, 3))


def test_one_image_has_no_statistics(folder, tmp_path):
    (tmp_path / "0.png").write_bytes(next(folder.glob("*/*.png")).read_bytes())
    with pytest.raises(DataError, match=f"{tmp_path.name}: statistics need at least two images, given 1"):
        made(tmp_path, tmp_path / "ref.npz")


def test_what_lies_beside_the_images_is_counted(folder, tmp_path):
    for path in sorted(folder.glob("*/*.png"))[:3]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "notes.txt").write_text("")
    assert reference_stats.collection(tmp_path, SIZE, None, None, None, 2).about["ignored"] == {"*.txt": 1}


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out.npz"
    reference_stats.write(out, {"mu": np.zeros(3)}, {})
    before = out.read_bytes()
    with pytest.raises(TypeError):
        reference_stats.write(out, {"mu": np.ones(3)}, {"not": {"JSON"}})
    assert (out.read_bytes(), list(tmp_path.iterdir())) == (before, [out])


def test_crops_are_those_that_are_asked_for_and_the_file_says_which(folder):
    found = reference_stats.collection(folder, SIZE, None, None, None, 2, "lanczos")
    assert found.about["crop"] == "lanczos"
    opened = image_collections.open_images(folder)
    for index, image in enumerate(found.stream):
        np.testing.assert_array_equal(image, image_collections.crop(opened, index, SIZE, "lanczos"))
