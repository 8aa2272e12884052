"""Memory, the objective's own parameters and groups of parameters, through everything that a step does with a state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diversedit_jax import sharding
from diversedit_jax.api import AuxLoss, Term
from diversedit_jax.data.pipeline import stacked
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import build
from diversedit_jax.runtime.files import flat
from diversedit_jax.training import optimizer
from diversedit_jax.training.step import TRAINED, initializer, train_step
from tests.outside import config as outside
from tests.outside import data

B = 16
DATA = data.make("train", size=B)
BATCH = jax.tree.map(jnp.asarray, stacked(DATA.source))
X = (np.asarray(BATCH["pixels"], np.float32).reshape(B, 4, 2, 4, 2).swapaxes(2, 3).reshape(B, 4, 4, 4) - 128) / 32


def components(devices=1, losses=None, **changes):
    """Those of `tests.outside`, on so many devices."""
    config = outside.get_config()
    config.update_from_flattened_dict({"batch_size": B, "optim.decay": "constant", **changes})
    experiment = build.build(config, DATA.space, jax.devices()[:devices])
    parts = experiment.components
    return parts._replace(losses=parts.losses if losses is None else losses), experiment.layout


def stepped(parts, steps=1, state=None):
    """The state after some steps."""
    state = state or jax.jit(initializer(parts, BATCH))(jax.random.key(0))
    step = jax.jit(partial(train_step, parts))
    for _ in range(steps):
        state, metrics = step(state, parts.codec.init(), BATCH, jax.random.key(1))
    return state, metrics


def test_memory_is_what_its_owner_returned_and_has_an_average():
    state, _ = stepped(components()[0], steps=2)
    memory, average = state["memory"]["objective"], state["ema_memory"]["objective"]
    mean = X.mean(axis=0)
    assert int(memory["examples"]) == int(average["examples"]) == 2 * B, "a count is not averaged"
    np.testing.assert_allclose(memory["mean"], (1 - 0.9**2) * mean, atol=1e-6)
    d = components()[0].ema_decay
    np.testing.assert_allclose(average["mean"], (1 - d) * (d * 0.1 + (1 - 0.9**2)) * mean, atol=1e-6)
    assert state["memory"]["losses"]["probe"].shape == ()


def test_each_accumulated_part_finds_the_memory_that_the_part_before_left():
    memory = stepped(components(accumulate=2)[0])[0]["memory"]["objective"]
    assert int(memory["examples"]) == B
    first, second = X[0::2].mean(axis=0), X[1::2].mean(axis=0)
    np.testing.assert_allclose(memory["mean"], 0.9 * 0.1 * first + 0.1 * second, atol=1e-6)


def test_a_skipped_step_leaves_no_trace():
    def apply(forward, batch, context):
        return Term(jnp.where(context.step == 1, jnp.nan, 0.0), memory=context.memory + 1)

    parts, _ = components(losses={"poison": AuxLoss(apply, memory=lambda forward, batch: jnp.int32(0))})
    one, _ = stepped(parts)
    two, metrics = stepped(parts, state=one)
    assert np.isnan(metrics["loss/poison"])
    assert int(two.pop("step")) == int(one.pop("step")) + 1 == 2
    jax.tree.map(np.testing.assert_array_equal, two, one)
    assert int(two["memory"]["losses"]["poison"]) == 1


def test_memory_keeps_its_shape():
    grown = AuxLoss(lambda *given: Term(0.0, memory=jnp.zeros(3)), memory=lambda forward, batch: jnp.zeros(2))
    parts, _ = components(losses={"grown": grown})
    with pytest.raises(ConfigError, match="returns a memory of other shapes"):
        stepped(parts)


def test_a_mesh_changes_nothing():
    changes = {"mesh.fsdp": 4}
    (one, _), (many, layout) = components(), components(8, **changes)
    state = jax.eval_shape(initializer(many, BATCH), jax.random.key(0))
    shardings = sharding.shardings(state, layout)
    assert shardings["memory"]["objective"]["mean"].mesh.shape["fsdp"] == 4
    state = jax.jit(initializer(many, BATCH), out_shardings=shardings)(jax.random.key(0))
    batch = sharding.put(jax.tree.map(np.asarray, BATCH), sharding.over_batch(layout))
    with jax.set_mesh(layout.mesh):
        step = jax.jit(partial(train_step, many), out_shardings=(shardings, None))
        found, _ = step(state, many.codec.init(), batch, jax.random.key(1))
    wanted, _ = stepped(one)
    for entry in ("memory", "ema_memory", *TRAINED):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found[entry], wanted[entry])


def test_a_group_has_its_own_rate_and_clip():
    """The first AdamW step is that of the group alone, clipped by its own norm."""
    trained = {"params": {"a": jnp.array([3.0, 4.0])}, "losses": {"probe": jnp.array([1.0])}, "objective": {}}
    grads = {"params": {"a": jnp.array([30.0, 40.0])}, "losses": {"probe": jnp.array([6.0])}, "objective": {}}
    main = {"learning_rate": 0.1, "clip": 1.0, "eps": 1.0}
    own = {"learning_rate": 0.5, "clip": 2.0, "eps": 1.0}
    made = optimizer.grouped(10, main, {"probe": own | {"of": "^losses/probe"}})
    updates, _ = made.transform.update(grads, made.transform.init(trained), trained)
    for entry, options, clipped in (("params", main, {"a": [0.6, 0.8]}), ("losses", own, {"probe": [2.0]})):
        alone, _ = optimizer.make(10, **options | {"clip": None})
        clipped = jax.tree.map(jnp.array, clipped, is_leaf=lambda leaf: isinstance(leaf, list))
        wanted, _ = alone.update(clipped, alone.init(trained[entry]), trained[entry])
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), updates[entry], wanted)
    assert optax.tree.norm(updates["losses"]) > optax.tree.norm(updates["params"])
    assert {label: float(rate(0)) for label, rate in made.rates.items()} == {
        "main": pytest.approx(0.1),
        "probe": pytest.approx(0.5),
    }


def test_a_group_that_takes_nothing_is_an_error():
    config = outside.get_config()
    config.groups.nothing = optimizer.group("^parms/")
    parts = build.build(config, DATA.space).components
    with pytest.raises(ConfigError, match=r"config.groups.nothing: no parameter's name fits '\^parms/'"):
        jax.eval_shape(initializer(parts, BATCH), jax.random.key(0))
    assert flat(config.to_dict())["groups.nothing.of"] == "^parms/"
