"""References: every file of the field gives the same statistics, in float64; what holds none is refused in one line."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.evaluation.reference_statistics import open_reference
from tools import reference_stats

D, S = 5, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)


def gaussian(d, seed):
    """A mean and a covariance, in float32 as some files have them."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    return rng.normal(size=d).astype(np.float32), (root @ root.T).astype(np.float32)


MU, SIGMA = gaussian(D, 1)
MU_S, SIGMA_S = gaussian(S, 2)
DINO = gaussian(7, 3)
FEATURES = np.random.default_rng(4).normal(size=(6, D)).astype(np.float32)


def npz(path, **arrays):
    np.savez(path / "reference.npz", **arrays)
    return path / "reference.npz"


def adm(path):
    return npz(path, arr_0=IMAGES, mu=MU, sigma=SIGMA, mu_s=MU_S, sigma_s=SIGMA_S)


def torch_fidelity(path):
    return npz(path, mu=np.float64(MU), sigma=np.float64(SIGMA))


def meanflow(path):
    return npz(path, ref_mu=MU, ref_sigma=SIGMA)


def edm2(path):
    both = {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": DINO[0], "sigma": np.float64(DINO[1])}}
    (path / "reference.pkl").write_bytes(pickle.dumps({"num_images": 50_000} | both))
    return path / "reference.pkl"


OF = {
    "count": 6,
    "size": [6, 6],
    "extractors": {
        "inception": {"weights": {"name": "a.pth", "digest": "a" * 64}},
        "dinov2": {"weights": {"name": "d.pth", "digest": "d" * 64}},
        "digits": {"weights": {"name": "random"}},
    },
}


def ours(path, about=OF, **changed):
    """As tools.reference_stats writes it."""
    arrays = {"mu": MU, "sigma": SIGMA, "mu_s": MU_S, "sigma_s": SIGMA_S, "features": FEATURES, "arr_0": IMAGES}
    arrays |= {"dinov2/mu": DINO[0], "dinov2/sigma": DINO[1]}
    arrays |= {"digits/mu": MU_S, "digits/sigma": SIGMA_S, "digits/features": FEATURES[:, :S]}
    arrays |= changed
    path = path / "reference.npz"
    reference_stats.write(path, {name: array for name, array in arrays.items() if array is not None}, about)
    return path


def same(found, wanted):
    for array, given in zip(found, wanted, strict=True):
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, given)


@pytest.mark.parametrize("write", [adm, torch_fidelity, meanflow, edm2, ours])
def test_every_file_has_the_statistics_of_inception(write, tmp_path):
    path = write(tmp_path)
    found = open_reference(str(path))
    assert found.about["format"] == ("diversedit_jax" if write is ours else write.__name__)
    assert (found.about["name"], len(found.about["sha256"])) == (path.name, 64)
    statistics = found.by_network["inception"]
    same(statistics.pool, (MU, SIGMA))
    assert (statistics.spatial is not None) == (write in (adm, ours))
    if statistics.spatial is not None:
        same(statistics.spatial, (MU_S, SIGMA_S))
    if write in (adm, ours):
        assert found.images.shape == (6, 6, 3)
        np.testing.assert_array_equal(found.images.read(0, 4), IMAGES)
    else:
        assert found.images is None
    if write is not ours:
        assert (statistics.features, statistics.digest) == (None, None)


def test_what_else_lies_in_a_file_changes_nothing(tmp_path):
    found = open_reference(npz(tmp_path, mu=MU, sigma=SIGMA, names=np.array(["a", "b"]), num=np.int64(3)))
    assert set(found.by_network) == {"inception"}
    same(found.by_network["inception"].pool, (MU, SIGMA))


def test_statistics_beside_images_are_of_the_kind_of_adm(tmp_path):
    found = open_reference(npz(tmp_path, arr_0=IMAGES, mu=MU, sigma=SIGMA))
    assert (found.about["format"], found.images.count) == ("adm", 4)
    assert found.by_network["inception"].spatial is None


def test_a_pickle_of_edm2_has_those_of_both_networks(tmp_path):
    found = open_reference(edm2(tmp_path)).by_network
    assert set(found) == {"inception", "dinov2"}
    same(found["dinov2"].pool, DINO)


def test_our_own_file_says_what_it_was_made_with(tmp_path):
    found = open_reference(ours(tmp_path))
    assert found.about["made"] == OF
    assert set(found.by_network) == {"inception", "dinov2", "digits"}
    assert {name: one.digest for name, one in found.by_network.items()} == {
        "inception": "a" * 64,
        "dinov2": "d" * 64,
        "digits": None,
    }
    same(found.by_network["dinov2"].pool, DINO)
    same(found.by_network["digits"].pool, (MU_S, SIGMA_S))
    np.testing.assert_array_equal(found.by_network["inception"].features, FEATURES)
    np.testing.assert_array_equal(found.by_network["digits"].features, FEATURES[:, :S])
    assert found.by_network["dinov2"][1:3] == (None, None)


def test_images_alone_are_a_reference_without_statistics(tmp_path):
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    np.save(tmp_path / "images.npy", IMAGES)
    for path in (npz(tmp_path, arr_0=IMAGES), tmp_path / "folder", tmp_path / "images.npy"):
        found = open_reference(path)
        assert (found.by_network, found.about["format"]) == ({}, "images")
        np.testing.assert_array_equal(found.images.read(0, 4), IMAGES)


def refused(path, words, kind=DataError):
    with pytest.raises(kind, match=words) as error:
        open_reference(path)
    assert str(error.value).isprintable()
    assert str(path) in str(error.value)


NAN = np.where(np.eye(D) > 0, np.nan, SIGMA)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": MU}, "has no sigma, it holds mu"),
        ({"sigma": SIGMA}, "has no mu, it holds sigma"),
        ({"sigma": SIGMA, "arr_0": IMAGES}, "has no mu, it holds sigma"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU_S}, "has no sigma_s, it holds mu, sigma, mu_s"),
        ({"mu": MU, "sigma": SIGMA, "sigma_s": SIGMA_S}, "has no mu_s, it holds mu, sigma, sigma_s"),
        ({"ref_mu": MU}, "holds ref_mu: wanted mu and sigma, or arr_0"),
        ({"mean": MU, "cov": SIGMA}, "holds cov, mean: wanted mu and sigma, or arr_0"),
        ({}, "holds nothing: wanted mu and sigma, or arr_0"),
        ({"mu": MU, "sigma": SIGMA_S}, r"mu and sigma have shapes \[5\] and \[3, 3\], wanted \[d\] and \[d d\]"),
        ({"mu": MU[None], "sigma": SIGMA}, r"mu and sigma have shapes \[1, 5\] and \[5, 5\], wanted"),
        ({"mu": MU, "sigma": SIGMA.diagonal()}, r"mu and sigma have shapes \[5\] and \[5\], wanted"),
        ({"mu": MU[:0], "sigma": SIGMA[:0, :0]}, r"mu and sigma have shapes \[0\] and \[0, 0\], wanted"),
        ({"mu": MU, "sigma": SIGMA + np.eye(D, k=1)}, "sigma is not symmetric, so no covariance"),
        ({"mu": MU, "sigma": -SIGMA}, "sigma has a variance of -[0-9.]+, so is no covariance"),
        ({"mu": MU, "sigma": NAN}, "sigma is not finite"),
        ({"mu": np.where(MU > 0, np.inf, MU), "sigma": SIGMA}, "mu is not finite"),
        ({"mu": np.array(["a"]), "sigma": SIGMA}, "mu or sigma is no array of numbers"),
        ({"mu": np.array([{}]), "sigma": SIGMA}, "cannot be read: array mu: Object arrays cannot be loaded"),
        ({"mu": MU, "sigma": SIGMA, "arr_0": IMAGES / 255}, r"arr_0 is float64 \[4, 6, 6, 3\]: wanted uint8"),
    ],
)
def test_statistics_that_are_none_are_refused(arrays, words, tmp_path):
    refused(npz(tmp_path, **arrays), words)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dinov2/sigma": None}, "has no dinov2/sigma"),
        ({"features": FEATURES[:, 1:]}, r"features of single images are float32 \[6, 4\], wanted floats \[m 5\]"),
        ({"features": FEATURES[0]}, r"features of single images are float32 \[5\], wanted floats \[m 5\]"),
        ({"features": FEATURES.astype(int)}, r"features of single images are int64 \[6, 5\], wanted floats \[m 5\]"),
        ({"features": np.where(FEATURES > 1, np.inf, FEATURES)}, "features of single images are not finite"),
        ({"about": []}, "about was not written by tools.reference_stats: TypeError"),
        ({"about": {}}, "about was not written by tools.reference_stats: KeyError: 'extractors'"),
        ({"about": {"extractors": {"inception": 3}}}, "about was not written by tools.reference_stats: AttributeError"),
    ],
)
def test_what_is_wrong_in_our_own_file_is_named(changed, words, tmp_path):
    refused(ours(tmp_path, **changed), words)


def test_an_array_that_is_called_about_need_not_be_ours(tmp_path):
    refused(npz(tmp_path, mu=MU, sigma=SIGMA, about=np.array("cats\nand dogs")), "about was not written by tools.ref")


class Code:
    """Unpickled as pickles are, it would run what it names."""

    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        return (open, (str(self.where), "w"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([MU, SIGMA], "its pickle is of a list, wanted a dict"),
        ({"mu": MU, "sigma": SIGMA}, "holds no statistics: wanted a dict with fid or fd_dinov2"),
        ({"fid": MU}, "holds no statistics: wanted a dict with fid or fd_dinov2"),
        ({"fid": {"mu": MU}}, "has no sigma, it holds mu"),
        ({"fid": {"mu": MU, "sigma": NAN}}, "sigma is not finite"),
        ({"fid": {"mu": "five", "sigma": SIGMA}}, "mu or sigma is no array of numbers"),
        ({"fid": {"mu": None, "sigma": {}}}, "mu or sigma is no array of numbers"),
        ({"fid": {"mu": MU, "sigma": SIGMA, "features": 3}}, r"are int64 \[\], wanted floats \[m 5\]"),
    ],
)
def test_other_pickles_are_refused(content, words, tmp_path):
    (tmp_path / "reference.pkl").write_bytes(pickle.dumps(content))
    refused(tmp_path / "reference.pkl", words)


def test_nothing_in_a_pickle_is_run(tmp_path):
    ran = tmp_path / "ran"
    content = pickle.dumps({"fid": {"mu": MU, "sigma": Code(ran)}})
    (tmp_path / "reference.pkl").write_bytes(content)
    refused(tmp_path / "reference.pkl", f"refuses to load {open.__module__}.open")  # io, or _io from Python 3.13 on
    assert not ran.exists()
    pickle.loads(content)["fid"]["sigma"].close()
    assert ran.exists(), "this pickle runs nothing at all, so it proves nothing"


def test_half_a_pickle_is_refused(tmp_path):
    path = edm2(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "cannot be read: its pickle cannot be read")
    path.write_bytes(b"")
    refused(path, "cannot be read: its pickle cannot be read")


def test_what_is_no_file_of_statistics_is_refused(tmp_path):
    refused(tmp_path / "nowhere.npz", "reference: .* does not exist")
    refused("https://example.org/VIRTUAL.npz", "reference: https://.* is not a path of this machine", ConfigError)
    page = tmp_path / "page.npz"
    page.write_text("<html>\n<body>Not found</body>")
    refused(page, r"not an .npz file: begins with b'<html>\\n<body>Not found")
    page.write_text("")
    refused(page, "not an .npz file: empty")
    whole = adm(tmp_path)
    page.write_bytes(whole.read_bytes()[:-50])
    refused(page, "not an .npz file: truncated")
    with zipfile.ZipFile(page, "w") as file:
        file.writestr("mu", "a text")
        file.writestr("sigma", json.dumps(SIGMA.tolist()))
    refused(page, "holds nothing: wanted mu and sigma, or arr_0")
    (tmp_path / "stats.txt").write_text("3")
    refused(tmp_path / "stats.txt", "is neither an .npz with arr_0 nor a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images")


def test_a_damaged_byte_is_refused_or_read_and_nothing_else(tmp_path):
    rng, read, errors = np.random.default_rng(0), 0, []
    for write in (adm, ours, edm2):
        path = write(tmp_path)
        whole = path.read_bytes()
        for place in rng.permutation(len(whole))[:60]:
            changed = bytearray(whole)
            changed[place] ^= 1 << rng.integers(8)
            path.write_bytes(changed)
            try:
                open_reference(path)
                read += 1
            except DataError as error:
                errors.append(str(error))
    assert min(read, len(errors)) > 20
    assert all(map(str.isprintable, errors))
