"""States that flax and orbax wrote, as the official MeanFlow saves them: read exactly, refused in one line."""

from contextlib import suppress

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from safetensors.numpy import load_file

from diversedit_jax.errors import WeightsError
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats import flax_msgpack
from diversedit_jax.weights.formats.weights_file import open_weights
from tests.reference import DATA


def state(shift: float = 1.0):
    """A training state of the official MeanFlow: its EMA the reference's network, its parameters others."""
    ema = {}
    for name, array in load_file(DATA / "meanflow.safetensors").items():
        *path, leaf = name.split("/")
        place = ema
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = array
    shifted = jax.tree.map(lambda array: array + np.float32(shift), ema)
    optimizer = {"0": {"count": np.int32(7), "mu": shifted, "nu": shifted}, "1": {}}
    return {"step": np.int32(7), "params": shifted, "opt_state": optimizer, "ema_params": ema}


def msgpack(path):
    path.write_bytes(serialization.msgpack_serialize(state()))
    return path


def folder(path):
    ocp.PyTreeCheckpointer().save(path, state())
    return path


def old_folder(path):
    """Before orbax wrote _METADATA, `checkpoint` held the tree, and names in place of arrays."""
    (folder(path) / "_METADATA").unlink()
    named = jax.tree.map_with_path(
        lambda place, leaf: f"PLACEHOLDER://{jax.tree_util.keystr(place, simple=True, separator='.')}", state()
    )
    (path / "checkpoint").write_bytes(serialization.msgpack_serialize(named))
    return path


@pytest.mark.parametrize("write", [msgpack, folder, old_folder])
def test_a_meanflow_checkpoint_is_read_by_entry(write, tmp_path):
    expected, _ = releases.open_release(DATA / "meanflow.safetensors", heads=4)
    path = write(tmp_path / "checkpoint_7")
    release, entries = releases.open_release(path, heads=4)
    assert release.family == "meanflow"
    assert entries["ema_params"] == len(jax.tree.leaves(state()["ema_params"]))
    jax.tree.map(np.testing.assert_array_equal, release.params, expected.params)
    trained, _ = releases.open_release(path, heads=4, weights="params")
    moved = jax.tree.map(lambda p: p + np.float32(1), expected.params)
    jax.tree.map(np.testing.assert_array_equal, trained.params, moved)


def test_the_folder_above_the_only_checkpoint_will_do(tmp_path):
    folder(tmp_path / "unzipped" / "checkpoint_7")
    release, _ = releases.open_release(tmp_path / "unzipped", heads=4)
    assert release.family == "meanflow"


def test_arrays_of_every_kind_and_what_is_no_array(tmp_path):
    rng = np.random.default_rng(0)
    kinds = [dtype for name, dtype in flax_msgpack.DTYPES.items() if name != "bool"]
    tree = {f"a{i}": rng.integers(0, 100, (2, 0, 3) if i == 3 else (2, i + 1)).astype(d) for i, d in enumerate(kinds)}
    tree |= {"big": np.zeros(70_000, np.float32), "bool": np.array([True, False]), "scalar": np.float32(2.5)}
    rest = {"int": -70_000, "huge": 2**40, "float": 0.1, "none": None, "true": True, "text": "x" * 300, "z": 1j}
    (tmp_path / "state").write_bytes(serialization.msgpack_serialize(tree | {"rest": rest}))
    with open_weights(tmp_path / "state") as file:
        assert set(file) == set(tree)
        for name, array in tree.items():
            found = file[name]
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
        assert file.tree["rest"] == rest | {"z": None}


def refused(path, words):
    with pytest.raises(WeightsError, match=words) as error:
        releases.open_release(path, heads=4)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_states_are_refused(tmp_path):
    tree = {"net": {"a": np.arange(40, dtype=np.float32).reshape(4, 10)}, "z": 1}
    whole, path = serialization.msgpack_serialize(tree), tmp_path / "state"
    for end in range(2, len(whole)):
        path.write_bytes(whole[:end])
        refused(path, "truncated|damaged|not a weight file")
    for old, new, words in [
        (b"\x92\x04\x0a", b"\x92\x04\x0b", "an array of 160 bytes that should be"),
        (b"\xa7float32", b"\xa7object_", "an array of 160 bytes that should be object_"),
        (b"\xa1z", b"\xc4\x00", "a key that is no name"),
        (b"\xa1z\x01", b"\xa1z\xc1", "damaged msgpack file: tag 0xc1"),
        (b"\xa1z", b"\xa3net", "or is there twice: net"),
    ]:
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        refused(path, words)
    rng = np.random.default_rng(0)
    for _ in range(1_000):
        damaged = bytearray(whole)
        for place in rng.integers(len(whole) - 162, size=2):  # the numbers are no structure
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with suppress(WeightsError), open_weights(path) as file:
            dict(file)
    path.write_bytes(whole + b"\0")
    refused(path, "something follows its tree")
    path.write_bytes(b"\x81\xa1a" + b"\x91" * 10_000)
    refused(path, "nested too deeply")


def test_damaged_folders_are_refused(tmp_path):
    (tmp_path / "plain").mkdir()
    refused(tmp_path / "plain", "a folder without weights .it is empty.: wanted ")
    path = folder(tmp_path / "checkpoint_7")
    for file in (path / "ocdbt.process_0" / "d").iterdir():  # what the arrays hold; after that their index, the tree
        file.write_bytes(b"")
    refused(path, r"orbax cannot read ema_params\.\S+: ValueError")
    for file in (path / "d").iterdir():
        file.write_bytes(b"")
    refused(path, "orbax cannot read this checkpoint")
    (path / "_METADATA").write_text("{")
    refused(path, "orbax cannot read this checkpoint")
