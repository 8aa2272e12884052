"""Parts of an evaluation on disk: whole or not there, of one plan, and joined to what ADM's script reads."""

import zipfile

import numpy as np
import pytest

from diversedit_jax.errors import CheckpointError, ConfigError, DataError, MachineError
from diversedit_jax.evaluation import feature_cache
from diversedit_jax.evaluation.extractors import Features

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
FIRSTS = [0, 4, 8]


def part(count):
    return {"toy": Features(RNG.normal(size=(count, 3)).astype(np.float32), None, np.ones((count, 2), np.float32))}


@pytest.fixture
def folder(tmp_path):
    """Three parts of ten images, which are kept."""
    folder = tmp_path / "parts"
    feature_cache.claim(folder, {"num": 10})
    for first in FIRSTS:
        images = IMAGES[first : first + 4]
        feature_cache.write(folder, first, part(len(images)), images, {first: images[0]})
    return folder


def test_what_is_written_is_read(folder):
    found = list(feature_cache.features(folder, FIRSTS, "toy"))
    assert [len(one.pool) for one in found] == [4, 4, 2]
    assert {one.spatial for one in found} == {None}
    assert found[2].logits.shape == (2, 2)
    shown = feature_cache.shown(folder, FIRSTS)
    assert shown.keys() == {0, 4, 8}
    np.testing.assert_array_equal(shown[4], IMAGES[4])
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "a temporary file was left"


def test_another_plan_is_refused_by_its_differences(tmp_path):
    plan = {"num": 10, "images": {"sampler": {"cfg_scale": 1.5, "interval": (0.0, 0.7)}}}
    assert not feature_cache.claim(tmp_path, plan)
    assert feature_cache.claim(tmp_path, plan), "tuples and lists are the same to JSON"
    other = {"num": 10, "images": {"sampler": {"cfg_scale": 2.0, "interval": (0.0, 0.7)}}}
    with pytest.raises(ConfigError, match=r"unfinished evaluation .*\(images.sampler.cfg_scale: 1.5 there, 2.0 given"):
        feature_cache.claim(tmp_path, other)
    with pytest.raises(ConfigError, match=r"\(seed: None there, 3 given"):
        feature_cache.claim(tmp_path, plan | {"seed": 3})
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan.json cannot be read"):
        feature_cache.claim(tmp_path, plan)


def test_a_damaged_part_is_not_there(folder):
    assert feature_cache.read(folder, 0) is not None
    assert feature_cache.read(folder, 12) is None
    path = feature_cache.place(folder, 4)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert feature_cache.read(folder, 4) is None
    assert not path.exists()
    flipped = bytearray(feature_cache.place(folder, 8).read_bytes())
    flipped[flipped.index(b"NUMPY") + 130] ^= 1
    feature_cache.place(folder, 8).write_bytes(flipped)
    assert feature_cache.read(folder, 8) is None


def test_no_flipped_byte_is_read_as_something_else(folder):
    wanted = feature_cache.read(folder, 8)
    assert wanted.keys() == {"toy/pool", "toy/logits", "images", "shown/8"}
    path = feature_cache.place(folder, 8)
    whole = path.read_bytes()
    for number in range(len(whole)):
        damaged = bytearray(whole)
        damaged[number] ^= 1 << number % 8 if number % 3 else 255
        path.write_bytes(damaged)
        found = feature_cache.read(folder, 8)  # some bytes, as of times, say nothing
        assert path.exists() == (found is not None)
        if found is not None:
            assert found.keys() == wanted.keys(), f"byte {number}"
            for name, array in wanted.items():
                np.testing.assert_array_equal(found[name], array, err_msg=f"byte {number}", strict=True)


def test_a_part_without_one_of_its_arrays_is_damaged(folder):
    path = feature_cache.place(folder, 4)
    with np.load(path) as file:
        rest = {name: file[name] for name in file.files if name != "toy/logits"}
    np.savez(path, **rest)
    assert feature_cache.read(folder, 4) is None
    assert not path.exists()


def test_a_part_that_cannot_be_written_is_an_error_in_one_line(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(CheckpointError, match=r"00000004.npz cannot be written: No space left on device"):
        feature_cache.write(folder, 4, part(4), IMAGES[:0], {})
    assert feature_cache.read(folder, 4) is not None, "what was there stays"


def test_images_are_joined_and_cut(folder, tmp_path):
    labels = np.arange(9)
    feature_cache.join_images(folder, FIRSTS, 9, labels, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], IMAGES[:9])
        assert file["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(file["labels"], labels)
    feature_cache.join_images(folder, FIRSTS, 10, None, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"]


def test_joined_images_can_be_read_in_pieces(folder, tmp_path):
    """As ADM's script reads a file that is larger than memory: from the zip, past the header, some images at a time."""
    feature_cache.join_images(folder, FIRSTS, 9, np.arange(9), tmp_path / "samples.npz")
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as member:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.namelist()[0] == "arr_0.npy"
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        assert (shape, fortran_order, dtype) == ((9, 4, 4, 3), False, np.uint8)
        for first in (0, 2, 4, 6, 8):
            wanted = IMAGES[first : min(first + 2, 9)]
            np.testing.assert_array_equal(np.frombuffer(member.read(wanted.size), np.uint8), wanted.ravel())
        assert not member.read()


def test_joined_images_that_cannot_be_written_leave_what_was_there(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    out = tmp_path / "samples.npz"
    out.write_bytes(b"before")
    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(CheckpointError, match=r"samples.npz cannot be written: No space left on device"):
        feature_cache.join_images(folder, FIRSTS, 9, np.arange(9), out)
    assert out.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"parts", "samples.npz"}


def test_what_a_killed_process_left_is_removed(folder):
    (folder / ".00000004.npz.4711").write_bytes(b"torn")
    (folder / ".plan.json.4711").write_bytes(b"{")
    feature_cache.remove(folder, FIRSTS)
    assert not folder.exists()


def test_nothing_but_its_own_files_is_removed(folder):
    (folder / "notes.txt").write_text("mine")
    feature_cache.remove(folder, FIRSTS)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    feature_cache.remove(folder, FIRSTS)
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_a_part_that_is_damaged_after_it_was_found_is_named(damage, folder, tmp_path):
    path = feature_cache.place(folder, 4)
    whole = path.read_bytes()
    path.write_bytes(whole[:200] if damage == "cut" else whole.replace(IMAGES[5].tobytes(), bytes(IMAGES[5].size)))
    if damage == "removed":
        path.unlink()
    with pytest.raises(DataError, match=r"00000004.npz was damaged or removed .*: run the same command again"):
        feature_cache.join_images(folder, FIRSTS, 10, None, tmp_path / "samples.npz")
    assert not (tmp_path / "samples.npz").exists()
    if damage != "changed":
        with pytest.raises(DataError, match=r"00000004.npz was damaged or removed"):
            list(feature_cache.features(folder, FIRSTS, "toy"))


def test_a_machine_that_lacks_files_costs_no_part(folder, monkeypatch):
    def refuse(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(feature_cache, "Npz", refuse)
    with pytest.raises(MachineError, match="Too many open files"):
        feature_cache.read(folder, 4)
    assert feature_cache.place(folder, 4).exists()
