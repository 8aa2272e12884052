"""A checkpoint comes back bit for bit or not at all."""

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diversedit_jax.errors import CheckpointError, ConfigError
from diversedit_jax.runtime.files import writable_folder
from diversedit_jax.sharding import by_name
from diversedit_jax.training import checkpoint
from diversedit_jax.training.checkpoint import FORMAT, Checkpoints
from diversedit_jax.training.checksums import checksum, checksums
from tests import ROOT, checkpoint_fixture


def make_state(seed, width=64):
    """Params, EMA, optimizer state with its classes and empty nodes, an empty dict, a step, and uncommon dtypes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "blocks": {"kernel": jax.random.normal(keys[0], (2, 16, width)), "bias": jnp.zeros((2, width))},
        "head": jax.random.normal(keys[1], (width, 8), jnp.bfloat16),
    }
    other = {
        "half": jnp.float16([1.5, -2, float("nan")]),
        "flags": jnp.array([True, False]),
        "bytes": jnp.uint8([0, 255]),
    }
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    ema = jax.tree.map(lambda x: x * 0.5, params)
    return {"params": params, "ema": ema, "opt": opt, "aux": {}, "step": jnp.int32(seed), "other": other}


def target_of(state):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def bits(tree):
    return [(x.shape, x.dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert bits(got) == bits(wanted)


def one_line(info):
    text = str(info.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 4 and 6 on disk; not to be changed."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        for step in (4, 6):
            checkpoints.save(step, make_state(step), {"seed": step})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# What goes in comes out.


def test_round_trip_is_exact_and_keeps_the_structure(saved):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [4, 6]
        state, meta = checkpoints.restore(target_of(make_state(0)))
        assert_same(state, make_state(6))
        assert meta == {"seed": 6}
        state, meta = checkpoints.restore(target_of(make_state(0)), step=4)
        assert_same(state, make_state(4))
        assert meta == {"seed": 4}


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_a_checkpoint_of_every_format_is_read(version, tmp_path):
    """Written once, when the format was new, by `python -m tests.checkpoint_fixture`."""
    with zipfile.ZipFile(checkpoint_fixture.file(version)) as packed:
        packed.extractall(tmp_path)
    wanted, step = checkpoint_fixture.state(), checkpoint_fixture.STEP
    state, meta = Checkpoints(tmp_path).restore(target_of(wanted))
    assert_same(state, wanted)
    assert meta == checkpoint_fixture.meta()
    record = json.loads((tmp_path / str(step) / "meta" / "metadata").read_text())
    assert record["body"]["checksums"] == checksums(by_name(wanted)), "the checksum itself has changed"


def test_a_checkpoint_of_a_newer_format_says_what_to_do(copy):
    file = copy / "6" / "meta" / "metadata"
    file.write_text(file.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(CheckpointError, match=rf"has format {FORMAT + 1}, .* install the version") as info:
        Checkpoints(copy).restore(target_of(make_state(0)))
    one_line(info)
    assert info.value.exit_code == 78


def test_restore_part_reads_one_entry(saved):
    ema, meta = Checkpoints(saved).restore_part(target_of(make_state(0)["ema"]), "ema")
    assert_same(ema, make_state(6)["ema"])
    assert meta == {"seed": 6}


def test_the_arrays_may_be_donated_while_they_are_written(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"w": jnp.zeros((256, 1024))}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            state = advance(state)
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = advance(state)
    for step, value in ((1, 1), (2, 5), (3, 9)):
        restored, _ = Checkpoints(tmp_path).restore(target_of(state), step)
        assert (np.asarray(restored["w"]) == value).all()


def test_reading_changes_nothing_on_disk(tmp_path):
    (tmp_path / "4.orbax-checkpoint-tmp-1").mkdir()  # another program may be writing it
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore(target_of(make_state(0)))
    assert [path.name for path in tmp_path.iterdir()] == ["4.orbax-checkpoint-tmp-1"]
    assert Checkpoints(tmp_path / "nowhere").steps() == []
    assert not (tmp_path / "nowhere").exists()


def test_keeps_the_newest_and_every_multiple(tmp_path):
    (tmp_path / "1.orbax-checkpoint-tmp-1").mkdir()
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(3, 11):
            checkpoints.save(step, {"w": jnp.ones(3)}, {})
    assert Checkpoints(tmp_path).steps() == [4, 8, 9, 10]
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize(("lower", "best"), [(True, [2, 6]), (False, [3, 4])])
def test_keeps_the_best(lower, best, tmp_path):
    """Scores come after their step is saved; what is not finite is never good; reopening forgets nothing."""
    values = {1: 5.0, 2: 1.0, 3: 9.0, 4: 8.0, 5: float("nan"), 6: 2.0, 7: 7.0, 8: 6.0}
    for step, value in values.items():
        with Checkpoints(tmp_path, keep=1, best=2, lower=lower) as checkpoints:
            checkpoints.save(step, {"w": jnp.ones(3)}, {})
            checkpoints.score(step, value)
    assert checkpoints.best_steps() == sorted(best, key=values.get, reverse=not lower)
    assert checkpoints.steps() == sorted({*best, 8})


def test_damaged_scores_are_an_error_that_names_them(tmp_path):
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"scores.json is damaged .*remove it to forget scores"):
        Checkpoints(tmp_path, best=1).score(1, 2.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"])
def test_checksum_shows_every_flipped_bit_and_position(dtype):
    x = np.zeros(6, dtype).reshape(2, 3)
    sums = [int(checksum(x))]
    for i in range(x.nbytes):
        for bit in [0] if dtype == "bool" else range(8):
            raw = bytearray(x.tobytes())
            raw[i] ^= 1 << bit
            sums.append(int(checksum(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape))))
    assert len(set(sums)) == len(sums)
    ones = jnp.ones((4, 5))
    assert checksum(ones) != checksum(ones.at[1:3, 2].multiply(-1))  # two sign bits


# What does not fit is refused by name.


def test_a_target_that_does_not_fit_names_the_array_and_both_shapes(saved):
    with pytest.raises(CheckpointError) as info:
        Checkpoints(saved).restore_part(target_of(make_state(0, width=96)["ema"]), "ema")
    assert one_line(info) == (
        f"checkpoint {saved}/6 does not fit this config: 3 of 3 arrays differ; first: "
        "ema/blocks/bias: checkpoint has [2, 64] float32, config needs [2, 96] float32. "
        "Use its config, or another workdir"
    )
    assert info.value.exit_code == 78


def test_a_target_of_another_dtype_or_structure_does_not_fit(saved):
    target = target_of(make_state(0))
    target["params"]["head"] = target["params"]["head"].update(dtype=jnp.float32)
    with pytest.raises(
        CheckpointError, match=r"1 of 17 .*params/head: checkpoint has \[64, 8\] bfloat16, config needs"
    ):
        Checkpoints(saved).restore(target)
    target = target_of(make_state(0)) | {"aux": {"repa": target["step"]}}
    with pytest.raises(CheckpointError, match=r"1 of 18 .*aux/repa: checkpoint has no such array, config needs \[\]"):
        Checkpoints(saved).restore(target)
    del target["aux"], target["ema"]
    with pytest.raises(CheckpointError, match=r"3 of 17 .*ema/blocks/bias: .*config needs no such array"):
        Checkpoints(saved).restore(target)
    with pytest.raises(CheckpointError, match=r"no step 5 in .*; it holds 4, 6"):
        Checkpoints(saved).restore(target, step=5)


def test_saving_an_old_step_is_an_error(copy):
    with Checkpoints(copy) as checkpoints:
        for step in (5, 6):
            with pytest.raises(CheckpointError, match=f"step {step} cannot be saved: .* already holds step 6"):
                checkpoints.save(step, make_state(step), {})
        checkpoints.save(7, make_state(7), {})
    assert Checkpoints(copy).steps() == [4, 6, 7]


# What is damaged is noticed.


def damages(directory, flips):
    """(name, function that does the damage) for every file of a step, `flips` of them a bit that turns."""
    rng = random.Random(0)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        size, name = path.stat().st_size, path.relative_to(directory)
        yield f"delete {name}", path.unlink
        yield f"empty {name}", lambda path=path: path.write_bytes(b"")
        yield f"halve {name}", lambda path=path, size=size: os.truncate(path, size // 2)
        for _ in range(min(flips, size)):
            at, bit = rng.randrange(size), rng.randrange(8)

            def flip(path=path, at=at, bit=bit):
                raw = bytearray(path.read_bytes())
                raw[at] ^= 1 << bit
                path.write_bytes(raw)

            yield f"flip bit {bit} of byte {at} of {name}", flip


@pytest.fixture
def small_heap():
    """A read that fails collects garbage, which takes a second after a thousand tests: let it search new objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("small_heap")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # late threads of tensorstore
@pytest.mark.parametrize("flips", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_no_damage_gives_a_wrong_state(saved, copy, flips):
    wanted, target, noticed = make_state(6), target_of(make_state(6)), []
    for name, damage in damages(copy / "6", flips):
        damage()
        try:
            (state, meta), text = Checkpoints(copy).restore(target), None
        except CheckpointError as error:
            text = str(error)
        if text is None:  # harmless
            assert bits(state) == bits(wanted), f"wrong state after: {name}"
            assert meta == {"seed": 6}, f"wrong meta after: {name}"
        else:
            noticed.append(name)
            assert "\n" not in text, name
            assert f"checkpoint {copy}/6 " in text, name
            assert text.endswith("Move it away to resume from step 4.") or "has format" in text, name
        shutil.rmtree(copy / "6")
        shutil.copytree(saved / "6", copy / "6")
    assert any("state/" in name and "flip" in name for name in noticed)
    assert {"delete meta/metadata", "delete state/manifest.ocdbt", "halve meta/metadata"} < set(noticed)


def test_an_empty_directory_is_a_damaged_step_that_can_be_moved_away(copy):
    (copy / "9").mkdir()
    with Checkpoints(copy) as checkpoints:
        with pytest.raises(CheckpointError) as info:
            checkpoints.restore(target_of(make_state(0)))
        assert one_line(info).startswith(f"checkpoint {copy}/9 is damaged (")
        assert one_line(info).endswith("Move it away to resume from step 6.")
        (copy / "9").rename(copy / "9.damaged")
        assert_same(checkpoints.restore(target_of(make_state(0)))[0], make_state(6))
        checkpoints.save(8, make_state(8), {})
    assert Checkpoints(copy).latest() == 8


def test_the_only_step_damaged_says_start_again(copy):
    shutil.rmtree(copy / "4")
    (copy / "6" / "meta" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match="Move it away to start from the beginning"):
        Checkpoints(copy).restore(target_of(make_state(0)))


def everything(directory):
    return {path: path.lstat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize("name", ["meta/metadata", "state/manifest.ocdbt", "state", "."])
def test_what_cannot_be_read_is_not_damaged(copy, name):
    """A file that leads to itself stands for a disk or a mount that fails: its bytes cannot be had."""
    path = copy / "6" / name
    path.rename(copy / "away")
    path.symlink_to(path)
    before = everything(copy)
    with pytest.raises((CheckpointError, OSError), match="Too many levels of symbolic links") as info:
        Checkpoints(copy).restore_newest(target_of(make_state(6)))
    assert "damaged" not in one_line(info)
    assert everything(copy) == before
    path.unlink()
    (copy / "away").rename(path)
    assert Checkpoints(copy).restore_newest(target_of(make_state(6)))[1:] == (6, [])


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("can't start new thread"), OSError(5, "EIO")])
def test_a_failing_machine_is_not_a_damaged_checkpoint(copy, error, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(Checkpoints, "_record", fail)
    before = everything(copy)
    with pytest.raises(CheckpointError, match=re.escape(f"{copy}/6 cannot be read ({type(error).__name__}: ")) as info:
        Checkpoints(copy).restore_newest(target_of(make_state(6)))
    assert one_line(info).endswith("It was not changed")
    assert everything(copy) == before


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "a\\b", "gs:"])
def test_a_path_that_orbax_misreads_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="orbax misreads") as info:
        Checkpoints(tmp_path / name)
    assert str(tmp_path / name) in one_line(info)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b]", "ü {x} 'q' $HOME", "m%20n#1", "-x,~|", "a:b\nc"])
def test_other_special_characters_are_legal_in_a_path(saved, tmp_path, name):
    shutil.copytree(saved, tmp_path / name)
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(8, make_state(8), {})
    assert_same(Checkpoints(tmp_path / name).restore(target_of(make_state(0)))[0], make_state(8))


def test_a_step_that_cannot_be_read_back_is_never_complete(saved, tmp_path, monkeypatch):
    """Orbax writes no index of the arrays here. Without the proof, this step would have removed the older ones."""
    monkeypatch.setattr(checkpoint, "UNUSABLE", re.compile("$^"))
    directory = Path(shutil.copytree(saved, tmp_path / "a[1]"))
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(8, make_state(8), {})
        with pytest.raises(CheckpointError, match=re.escape("Whole steps: 4, 6.")):
            checkpoints.wait()
    assert Checkpoints(directory).steps() == [4, 6]


def test_no_setting_keeps_nothing(copy):
    for keep in (0, -1):
        with pytest.raises(ConfigError, match=f"keep = {keep}: must be at least 1"):
            Checkpoints(copy, keep=keep)


def test_what_a_smaller_keep_removes_is_known_before(copy):
    assert Checkpoints(copy, keep=2).surplus() == []
    assert Checkpoints(copy, keep=1).surplus() == [4]
    assert Checkpoints(copy, keep=1, keep_every=2).surplus() == []
    with Checkpoints(copy, keep=1) as checkpoints:
        checkpoints.save(8, make_state(8), {})
    assert Checkpoints(copy).steps() == [8]


# Other processes: another mesh, a full disk, a kill.

PRELUDE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.errors import CheckpointError
def make(step): return {"w": jnp.arange(2.0**20) * step, "step": jnp.int32(step)}
"""


def program(code, directory):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(directory)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def output(code, directory):
    process = program(code, directory)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def test_another_mesh_restores_equal_values(tmp_path):
    code = """
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
def sharding(shape, spec):
    count = int(np.prod(shape))
    return NamedSharding(Mesh(np.array(jax.devices()[:count]).reshape(shape), ("data", "fsdp")), spec)
value = {"a": np.random.default_rng(0).normal(size=(16, 24)).astype("float32"), "b": np.arange(8.0, dtype="float32")}
specs = {"a": P("data", "fsdp"), "b": P("fsdp")}
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {k: jax.device_put(v, sharding((4, 2), specs[k])) for k, v in value.items()}, {})
    for shape in [(4, 2), (2, 4), (8, 1), (1, 1)]:
        new = {k: sharding(shape, spec) for k, spec in specs.items()}
        target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=new[k]) for k, v in value.items()}
        state, _ = checkpoints.restore(target)
        for k in value:
            assert state[k].sharding == new[k], (shape, k)
            np.testing.assert_array_equal(np.asarray(state[k]), value[k])
print("equal")
"""
    assert output(code, tmp_path)[0] == "equal\n"


@pytest.mark.slow
def test_checksums_of_many_split_arrays_do_not_wait_for_each_other(tmp_path):
    """Sums over more devices than cores that run side by side stand still, mostly within a second."""
    code = """
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from diversedit_jax.training.checksums import checksums
split = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
arrays = {str(i): jax.device_put(np.ones((64, 64 + i % 5)), split) for i in range(60)}
for _ in range(500):
    checksums(arrays)
print("done")
"""
    assert output(code, tmp_path)[0] == "done\n"


def test_a_full_disk_is_an_error_that_leaves_the_old_step(tmp_path):
    code = """
import resource, signal
from absl import logging
logging.set_verbosity(logging.INFO)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
state = {"w": jax.random.normal(jax.random.key(0), (2**18,))}  # does not compress
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    for surface in (checkpoints.wait, lambda: checkpoints.save(3, state, {})):
        try:
            checkpoints.save(2, state, {})
            surface()
            print("no error")
        except CheckpointError as error:
            print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.save(4, state, {})
print(checkpoints.steps())
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
for step in checkpoints.steps():
    assert checkpoints.restore(target, step)[0]["w"].tobytes() == state["w"].tobytes()
"""
    out, err = output(code, tmp_path)
    lines = out.splitlines()
    assert len(lines) == 3, out
    for line in lines[:2]:
        assert line.startswith(f"checkpoint {tmp_path}/2 could not be written ("), line
        assert line.endswith("). Whole steps: 1."), line
    assert lines[2] == "[1, 4]"
    assert not list(tmp_path.glob("*tmp*"))
    assert err == "", "orbax wrote to the terminal"


def kill_while_saving(directory, delay):
    code = """
with Checkpoints(sys.argv[1]) as checkpoints:
    begin = (checkpoints.latest() or 0) + 1
    for step in range(begin, 10**6):
        checkpoints.save(step, make(step), {"step": step})
        if step == begin + 1: print(step, flush=True)
"""
    process = program(code, directory)
    try:
        assert process.stdout.readline(), process.stderr.read()  # the save before this one is complete
        time.sleep(delay)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    step = Checkpoints(directory).latest()
    target = target_of({"w": jnp.zeros(2**20), "step": jnp.int32(0)})
    state, meta = Checkpoints(directory).restore(target)
    assert meta == {"step": step}
    assert int(state["step"]) == step
    np.testing.assert_array_equal(np.asarray(state["w"]), np.arange(2**20, dtype=np.float32) * step)
    return step


def test_a_kill_during_a_save_leaves_the_step_before(tmp_path):
    rng, step = random.Random(1), 0
    for _ in range(2):
        later = kill_while_saving(tmp_path, rng.random() * 0.3)
        assert later > step
        step = later
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(step + 1, {"w": jnp.ones(3)}, {})
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kills_at_many_moments(tmp_path, seed):
    kill_while_saving(tmp_path, random.Random(seed).random())


# The working directory.


def test_writable_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert writable_folder("a/b") == tmp_path / "a" / "b"
    assert writable_folder(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x", "/proc/x", "gs://bucket/x"):
        with pytest.raises(ConfigError, match=rf"^workdir {path} .+$") as info:
            writable_folder(path)
        one_line(info)
