"""SRA: equal to the reference, its teacher's times and cost, its distances and weights."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diversedit_jax import losses, models, objectives
from diversedit_jax.api import Codec, Conditions, Context, Space
from diversedit_jax.diffusion import paths
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses import sra
from diversedit_jax.losses._shared import head
from diversedit_jax.objectives.flow_matching import regress
from diversedit_jax.training.step import Components, initializer, train_step
from tests import reference
from tests.losses.test_conformance import batch, features, forward, teacher

FORMS = {"smooth_l1": "sml1", "l2": "l2", "l1": "l1", "cosine_tokens": "cos"}


@pytest.fixture(scope="module")
def compared():
    """The student's feature through the reference's head, the teacher's, and the reference's numbers."""
    config = json.loads((reference.DATA / "sra_config.json").read_text())
    gold, arrays = reference.numbers("sra"), reference.weights("sra_student")
    dims = {"depth": config["depth"], "width": config["hidden_size"], "heads": config["num_heads"]}
    block, teacher_block = int(gold["block_out_s"]), int(gold["block_out_t"])
    shape = (config["input_size"], config["input_size"], config["in_channels"])
    space = Space(shape, Conditions.labels(config["num_classes"]))
    model = models.make("dit", space, {}, (block, teacher_block), patch=config["patch_size"], **dims)
    student, ema = (reference.released(name, "sit", config["num_heads"]) for name in ("sra_student", "sra_teacher"))
    released = {
        f"fc{i}": {
            "kernel": jnp.asarray(arrays[f"ap_head.linear{i}.weight"].T),
            "bias": jnp.asarray(arrays[f"ap_head.linear{i}.bias"]),
        }
        for i in (1, 2)
    }
    whole = regress(
        model.network(student), paths.make("linear"), gold["lat"], gold["noise"], gold["t"], gold["y"].astype(int)
    )
    np.testing.assert_allclose(whole.loss, gold["denoising_loss"], rtol=1e-5)
    t = jnp.clip(gold["t"] - gold["t_max"] * gold["offset_u"], 0, 1).astype(jnp.float32)
    _, seen = whole.rerun(model.network(ema), t)
    return head(released, whole.features[block]), seen[teacher_block], gold


@pytest.mark.parametrize("form", FORMS)
def test_distances_equal_the_reference(compared, form):
    student, seen, gold = compared
    wanted = gold[f"align_{FORMS[form]}"]
    np.testing.assert_allclose(sra.sra_loss(student, seen, form).mean(), wanted.mean(), rtol=1e-5)
    if wanted.ndim:
        np.testing.assert_allclose(sra.DISTANCES[form](student, seen), wanted, rtol=1e-4, atol=1e-5)


def test_cosine_is_along_channels_or_tokens():
    a, b = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    for form, axis in (("cosine", -1), ("cosine_tokens", 1)):
        cosines = np.sum(a * b, axis) / np.linalg.norm(a, axis=axis) / np.linalg.norm(b, axis=axis)
        np.testing.assert_allclose(sra.sra_loss(a, b, form), 1 - cosines.mean(axis=1), rtol=1e-5)


def test_the_teacher_is_earlier_by_up_to_t_max():
    t = jnp.linspace(0, 1, 4000)
    earlier = sra.earlier(jax.random.key(0), t, t_max=0.2)
    inside = np.asarray(t - earlier)[t > 0.2]
    assert inside.min() >= 0
    assert inside.max() <= 0.2
    assert inside.mean() == pytest.approx(0.1, abs=0.003)
    assert inside.std() == pytest.approx(0.2 / np.sqrt(12), rel=0.03)
    assert earlier.min() == 0
    np.testing.assert_array_equal(sra.earlier(jax.random.key(0), t, t_max=0.0), t)


def test_steps_are_whole_and_at_least_1():
    t = jnp.arange(1000.0)
    earlier = sra.earlier(jax.random.key(0), t, num_timesteps=1000)
    np.testing.assert_array_equal(earlier, jnp.round(earlier))
    lag = np.asarray(t - earlier)[200:]
    assert lag.min() >= 0
    assert lag.max() in range(190, 200)
    assert earlier.min() == 1


def test_steps_taken_for_times_stop_the_run():
    assert jnp.isnan(sra.earlier(jax.random.key(0), jnp.array([3.0, 500.0]))).all()


def test_the_weight_falls_tenfold_in_a_thousand_epochs_after_the_149th():
    at = [sra.weight_at(epoch * 5004) for epoch in (0, 149, 150, 649, 1149)]
    np.testing.assert_allclose(at, [0.2, 0.2, 0.2 * 10**-0.001, 0.2 * 10**-0.5, 0.02], rtol=1e-5)
    assert sra.weight_at(149 * 5004 + 5003) == at[1]
    assert sra.weight_at(10**7, 0.5, decay_epochs=None) == 0.5
    np.testing.assert_allclose(sra.weight_at(180, 0.2, 99, 800, steps_per_epoch=1), 0.2 * 10 ** (-81 / 800), rtol=1e-5)


def test_the_head_has_the_published_number_of_parameters():
    for d, millions in ((768, 2.36), (1024, 4.20), (1152, 5.31)):
        whole = forward([jax.ShapeDtypeStruct((2, 4, d), jnp.float32)] * 9)
        shapes = jax.eval_shape(lambda key, whole=whole: losses.make("sra").init(key, whole, {}), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.01)


def test_the_teacher_runs_no_further_than_its_block():
    """In a training step the loops over blocks turn 12 times forward and 12 back for the student, 4 for the teacher."""
    space, depth = Space((4, 4, 3), Conditions.labels(5)), 12
    aux = {"sra": losses.make("sra", block=2, teacher_block=4)}
    model = models.make("dit", space, {}, aux["sra"].blocks, depth=depth, width=16, heads=2, skip="release")
    codec = Codec(dict, lambda frozen, batch, key: batch, None)
    parts = Components(
        model, codec, objectives.make("flow_matching"), aux, optax.sgd(0.1), 0.9, 1, space.conditions.null
    )
    given = {"x": jnp.zeros((1, *space.shape)), "y": jnp.zeros(1, jnp.int32)}
    state = jax.eval_shape(initializer(parts, given), jax.random.key(0))
    key = jax.random.key(0, impl="unsafe_rbg")  # its random bits come without loops of their own
    step = jax.jit(partial(train_step, parts), compiler_options={"xla_backend_optimization_level": 0})
    text = step.lower(state, {}, given, key).compile().as_text()
    turns = sum(map(int, re.findall(r'known_trip_count"?:\{"n":"(\d+)"', text)))
    assert turns == 2 * depth + 4


def test_the_teacher_is_asked_at_the_earlier_times():
    asked, whole = [], forward(features())

    def rerun(network, t):
        asked.append(t)
        return whole.rerun(network, t)

    loss = losses.make("sra")
    params = loss.init(jax.random.key(0), whole, batch())
    context = Context(jax.random.key(1), step=jnp.int32(0), params=params, teacher=teacher)
    value, metrics, *_ = loss.apply(whole._replace(rerun=rerun), batch(), context)
    (t,) = asked
    assert (t <= whole.t).all()
    assert len(np.unique(whole.t - t)) > 2, "not a draw for each example"
    assert metrics["lag"] == pytest.approx(float((whole.t - t).mean()), rel=1e-5)
    student, (_, seen) = head(params, whole.features[3]), whole.rerun(teacher, t)
    assert value == pytest.approx(0.2 * float(sra.sra_loss(student, seen[8]).mean()), rel=1e-5)


@pytest.mark.parametrize(("t_max", "num_timesteps"), [(0.1, None), (0.5, 1000)])
def test_every_option_reaches_the_loss(t_max, num_timesteps):
    decay = {"decay_from_epoch": 1, "decay_epochs": 4, "steps_per_epoch": 10}
    options = {"coefficient": 0.3, "distance": "l2", "dtype": "bfloat16", "block": 2, "teacher_block": 5} | decay
    asked, whole, key = [], forward(features()), jax.random.key(1)
    t = whole.t * (num_timesteps or 1)
    whole = whole._replace(t=t, rerun=lambda network, t: (asked.append(t), (None, features(seed=1)))[1])
    loss = losses.make("sra", t_max=t_max, num_timesteps=num_timesteps, **options)
    params = loss.init(jax.random.key(0), whole, batch())
    term = loss.apply(whole, batch(), Context(key, step=jnp.int32(35), params=params))
    np.testing.assert_array_equal(asked[0], sra.earlier(key, t, t_max, num_timesteps))
    student = head(params, features()[2], jnp.bfloat16)
    distance = sra.sra_loss(student, features(seed=1)[5], "l2").mean()
    np.testing.assert_allclose(term.loss, 0.3 * 10 ** (-2 / 4) * distance, rtol=1e-5)
    np.testing.assert_allclose(term.full, 0.3 * distance, rtol=1e-6)
    assert loss.blocks == (2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "smoothl1"}, "distance = 'smoothl1' is unknown; did you mean 'smooth_l1'"),
        ({"t_max": 200.0}, "t_max = 200.0: must be at least 0 and at most 1"),
        ({"t_max": 0.01, "num_timesteps": 50}, "t_max = 0.01 of num_timesteps = 50 is less than one step"),
        ({"steps_per_epoch": 0}, "steps_per_epoch = 0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        losses.make("sra", **options)
