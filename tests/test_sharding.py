"""Which devices hold which part of what: meshes, rules, the rows that a process reads."""

import math
import os
import re
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diversedit_jax import sharding
from diversedit_jax.api import Conditions, Space
from diversedit_jax.configs import diversedit
from diversedit_jax.errors import ConfigError
from diversedit_jax.models.dit import RULES
from diversedit_jax.runs import build
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.checksums import checksum
from diversedit_jax.training.step import initializer
from tests.training.test_step import KEY, batch, full_parts


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"data": 8}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": 1, "fsdp": 8}, (1, 8, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "tensor": -1}, (2, 1, 4)),
    ],
)
def test_meshes(sizes, shape):
    layout = sharding.make(**sizes)
    assert tuple(layout.mesh.shape.values()) == shape
    assert layout.shards == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data 3 x fsdp 1 x tensor 1 must give the 8 devices that JAX sees"),
        ({"data": 4, "fsdp": 4}, "data 4 x fsdp 4 x tensor 1 must give the 8 devices that JAX sees"),
        ({"fsdp": 3}, "data -1 x fsdp 3 x tensor 1 must give the 8 devices that JAX sees"),
        ({"fsdp": 0}, "data -1 x fsdp 0 x tensor 1 must give the 8 devices that JAX sees"),
        ({"fsdp": -1}, "data -1 x fsdp -1 x tensor 1 must give the 8 devices that JAX sees; one size may be -1"),
        ({"tensor": 3}, "data -1 x fsdp 1 x tensor 3 must give the 8 devices that JAX sees"),
        ({"data": -2, "fsdp": -4}, "data -2 x fsdp -4"),
        ({"data": 0, "fsdp": 8}, "data 0 x fsdp 8"),
        ({"rules": [("(", "*")]}, "config.mesh.rules: ('(', '*'): missing )"),
        ({"rules": [("fc1", "- data")]}, "'data' is none of -, *, fsdp, tensor, fsdp+tensor"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        sharding.make(**sizes)


def test_only_data_spans_slices():
    devices = [mock.Mock(spec=jax.Device, platform="tpu", slice_index=index // 4) for index in range(8)]
    message = "config.mesh.data = 1 must be a multiple of the 2 slices; fsdp and tensor cannot span slices"
    with pytest.raises(ConfigError, match=re.escape(message)):
        sharding.make(fsdp=8, data=1, devices=devices)


def spec(name: str, shape: tuple[int, ...], layout: sharding.Layout) -> PartitionSpec:
    """Where the rules, with those of dit, put an array of this name and shape."""
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for key in reversed(name.split("/")):
        tree = {key: tree}
    return jax.tree.leaves(sharding.shardings(tree, layout.with_rules(RULES)))[0].spec


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("params/shallow/qkv/kernel", (6, 64, 3, 4, 16), (None, "fsdp", None, "tensor", None)),
        ("opt/0/mu/params/deep/qkv/kernel", (6, 64, 3, 4, 16), (None, "fsdp", None, "tensor", None)),
        ("ema/deep/qkv/bias", (6, 3, 4, 16), (None, None, "tensor", None)),
        ("params/shallow/fc1/kernel", (6, 64, 256), (None, "fsdp", "tensor")),
        ("params/shallow/fc1/bias", (6, 256), (None, "tensor")),
        ("params/deep/fc2/kernel", (6, 256, 64), (None, "tensor", "fsdp")),
        ("params/deep/proj/kernel", (6, 64, 64), (None, "tensor", "fsdp")),
        ("params/deep/ada/kernel", (6, 64, 384), (None, None, ("fsdp", "tensor"))),
        ("params/merges/linear/kernel", (6, 128, 64), (None, ("fsdp", "tensor"), None)),
        ("params/time_embed/fc1/kernel", (256, 64), (("fsdp", "tensor"), None)),
        ("params/final/kernel", (64, 66), (("fsdp", "tensor"), None)),
        ("params/final/kernel", (33, 130), (None, "fsdp")),
        ("losses/repa/fc1/kernel", (64, 256), (None, ("fsdp", "tensor"))),
        ("params/deep/ada/kernel", (8, 33, 33), ()),
        ("params/final/bias", (64,), ()),
        ("step", (), ()),
    ],
)
def test_rules(name, shape, wanted):
    assert spec(name, shape, sharding.make(data=2, fsdp=2, tensor=2)) == PartitionSpec(*wanted)


def test_without_tensor_the_largest_axis_is_split():
    layout = sharding.make(fsdp=4)
    assert spec("params/shallow/fc1/kernel", (6, 64, 256), layout) == PartitionSpec(None, None, "fsdp")
    assert spec("params/deep/fc2/kernel", (6, 256, 64), layout) == PartitionSpec(None, "fsdp", None)
    assert spec("params/shallow/fc1/bias", (8, 256), layout) == PartitionSpec()


def test_rules_of_a_config_come_first():
    layout = sharding.make(fsdp=2, tensor=2, rules=[("label_embed", "fsdp+tensor -"), ("time_embed", "- -")])
    assert spec("ema/label_embed/embedding", (12, 4096), layout) == PartitionSpec(("fsdp", "tensor"), None)
    assert spec("ema/time_embed/fc1/kernel", (256, 64), layout) == PartitionSpec()
    assert spec("ema/final/kernel", (256, 64), layout) == PartitionSpec(("fsdp", "tensor"), None)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("params/deep/qkv/kernel", (6, 64, 3, 6, 16), "tensor = 4 does not divide axis 3 of params/deep/qkv/kernel"),
        ("params/deep/qkv/kernel", (6, 64, 48), "'- * - tensor -' must have a word for each of the 3 axes of params/"),
    ],
)
def test_what_a_rule_cannot_split_is_named(name, shape, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        spec(name, shape, sharding.make(tensor=4))


def test_the_layers_of_a_state_are_never_split():
    layout = sharding.make(data=2, fsdp=4).with_rules(RULES)
    state = jax.eval_shape(initializer(full_parts(), batch()), KEY)
    where = sharding.shardings(state, layout)
    for half in ("shallow", "deep", "merges"):
        specs = [place.spec for place in jax.tree.leaves(where["params"][half])]
        assert all(len(spec) == 0 or spec[0] is None for spec in specs)
        assert any("fsdp" in spec for spec in specs), f"{half}: nothing is split"
    assert "fsdp" in where["losses"]["head"]["kernel"].spec
    assert where["step"].spec == PartitionSpec()
    placed = sharding.placed(state, where)
    assert_same = jax.tree.map(
        lambda p, s, w: p.shape == s.shape and p.dtype == s.dtype and p.sharding == w, placed, state, where
    )
    assert all(jax.tree.leaves(assert_same))


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}])
def test_rows_that_a_process_reads_make_the_batch(sizes):
    layout = sharding.make(**sizes)
    given = {"x": np.arange(48, dtype=np.float32).reshape(16, 3), "y": np.arange(16)}
    mine = sharding.rows(layout, 16)
    made = sharding.from_rows({name: x[mine] for name, x in given.items()}, layout, 16)
    for name, x in given.items():
        np.testing.assert_array_equal(made[name], x)
        assert made[name].sharding == sharding.over_batch(layout)


def test_the_compiler_is_told_where_examples_lie_only_on_a_mesh():
    x = np.zeros((16, 3), np.float32)
    told = jax.make_jaxpr(sharding.kept_over_batch)
    assert "sharding_constraint" not in str(told(x))
    with jax.set_mesh(sharding.make(data=2, fsdp=4).mesh):
        assert sharding.platform() == "cpu"
        assert "sharding_constraint" in str(told(x))
    with jax.set_mesh(jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert "sharding_constraint" not in str(told(x)), "a mesh of someone else"


# --- Nothing is ever whole on one device.


def xl_under_fsdp(**changes):
    """DiverseDiT-XL/2 over 8 devices: how its state is made, and where that lives."""
    config = diversedit.get_config("xl2")
    config.mesh.update({"data": 1, "fsdp": 8})
    config.model.update(changes)
    experiment = build.build(config, Space((32, 32, 4), Conditions.labels(1000)))
    stored = {"moments": jnp.zeros((8, 32, 32, 8), jnp.float16), "y": jnp.zeros(8, jnp.int32)}
    init = initializer(experiment.components, stored)
    abstract = jax.eval_shape(init, KEY)
    return init, sharding.placed(abstract, sharding.shardings(abstract, experiment.layout))


def size(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


@pytest.mark.slow
def test_a_new_state_of_xl_takes_a_shard_of_memory():
    """Of 10.6 GiB a device holds an eighth, and while it is made not half of its largest array more."""
    init, target = xl_under_fsdp()
    state = sum(map(size, jax.tree.leaves(target)))
    where = jax.tree.map(lambda leaf: leaf.sharding, target)
    memory = jax.jit(init, out_shardings=where).lower(KEY).compile().memory_analysis()
    largest = max(map(size, jax.tree.leaves(target)))
    assert state > 10 * 2**30
    assert memory.output_size_in_bytes < 1.01 * state / 8
    assert memory.peak_memory_in_bytes < 1.01 * state / 8 + largest / 2


@pytest.mark.slow
def test_the_checksum_of_an_array_gathers_nothing():
    _, target = xl_under_fsdp()
    largest = max(jax.tree.leaves(target), key=size)
    assert checksum.lower(largest).compile().memory_analysis().temp_size_in_bytes < 1.1 * size(largest) / 8


@pytest.mark.slow
def test_a_restore_holds_the_state_once(tmp_path):
    """The process that simulates all 8 devices needs what they need together, and not a whole array for each."""
    where = tmp_path / "checkpoints"
    init, target = xl_under_fsdp(depth=4)
    with Checkpoints(where) as checkpoints:
        checkpoints.save(1, jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, target))(KEY), {})
    program = f"""
import resource, jax
from diversedit_jax.training.checkpoint import Checkpoints
from tests.test_sharding import xl_under_fsdp
_, target = xl_under_fsdp(depth=4)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
state, _ = Checkpoints({str(where)!r}).restore(target)
print(jax.block_until_ready(state)["step"], peak() - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    state = sum(map(size, jax.tree.leaves(target)))
    assert int(found.stdout.split()[1]) < 1.3 * state, f"of {state}: {found.stdout}"
