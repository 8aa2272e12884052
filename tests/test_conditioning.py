"""Conditions of any kind: dropped once per example, paired with the null condition, chosen for samples."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import conditioning, objectives
from diversedit_jax.api import Conditions, Context
from diversedit_jax.errors import ConfigError

B = 2000
NULL = {"context": np.zeros((3, 2), np.float32), "mask": np.zeros(3, bool)}
TEXT = {"context": jnp.ones((B, 3, 2)), "mask": jnp.ones((B, 3), bool)}


def dropped(y, null, probability, **context):
    batch = {"x": jnp.zeros((B, 1)), "y": y}
    return conditioning.drop(jax.random.key(0), batch, Context(jax.random.key(1), null, **context), probability)


def test_dropout_draws_once_for_all_arrays_of_an_example():
    found = dropped(TEXT, NULL, 0.3)
    context, mask = (np.asarray(leaf).reshape(B, -1) for leaf in (found["context"], found["mask"]))
    whole = mask[:, 0]
    assert (mask == whole[:, None]).all()
    assert (context == whole[:, None]).all(), "what is dropped is null in every array"
    assert 1 - whole.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.3 * 0.7 / B))
    labels = np.asarray(dropped(jnp.arange(B), np.int32(-1), 0.3))
    np.testing.assert_array_equal(labels, np.where(whole, np.arange(B), -1), "one draw, whatever a condition is")


def test_nothing_is_dropped_where_nobody_learns():
    assert dropped(TEXT, NULL, 1.0, training=False) is TEXT


# --- What objectives drop.

# name -> options, and the number of draws: times, noise, dropped labels; REG's second noise; MeanFlow's second times
# and its examples with equal times.
OBJECTIVES = {
    "flow_matching": ({}, 3),
    "ddpm": ({"learn_sigma": False}, 3),
    "reg": ({"width": 1}, 4),
    "mean_flow": ({"omega": 1.0, "kappa": 0.0, "positional": False, "drop": "independent"}, 5),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
COUNT = 20_000


@cache
def passed(name, b=COUNT, **options):
    """(times, labels, labels that the network sees, keys of the draws) of b examples, labelled in their order."""
    seen, keys = [], set()

    def network(x_t, t, y, *, span=None, token=None):
        seen.append(y)
        return (x_t if token is None else (x_t, token)), ()

    def recorded(draw):
        return lambda key, *given: (keys.add(tuple(jax.random.key_data(key).tolist())), draw(key, *given))[1]

    batch = {"x": jnp.ones((b, 1)), "y": jnp.arange(b), "token/dinov2": jnp.ones((b, 1))}
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("normal", "uniform", "randint", "bernoulli"):
            patch.setattr(jax.random, draw, recorded(getattr(jax.random, draw)))
        objective = objectives.make(name, **OBJECTIVES[name][0] | options)
        forward = objective.apply(network, batch, Context(jax.random.key(0), np.int32(-1)))
    return np.asarray(forward.t), np.asarray(forward.y), np.asarray(seen[-1]), keys


@every_objective
def test_a_dropped_label_is_the_null_label(name):
    _, labels, seen, _ = passed(name)
    changed = labels != np.arange(COUNT)
    assert abs(changed.mean() - 0.1) < 4 * (0.09 / COUNT) ** 0.5
    assert (labels[changed] == -1).all()
    np.testing.assert_array_equal(seen, labels)


@every_objective
def test_the_probability_is_an_option(name):
    for probability, wanted in ((0.0, [0, 1]), (1.0, [-1, -1])):
        assert passed(name, 2, condition_drop=probability)[1].tolist() == wanted


@every_objective
def test_labels_are_dropped_at_every_time_alike(name):
    t, labels, *_ = passed(name)
    early, late = (labels == -1)[np.argsort(t)].reshape(2, -1).mean(axis=1)
    bound = 4 * (0.09 / (COUNT // 2)) ** 0.5
    assert abs(early - 0.1) < bound
    assert abs(late - 0.1) < bound


@every_objective
def test_every_draw_has_a_key_of_its_own(name):
    """Draws of one key are functions of each other: noise or dropped labels of the times, for example."""
    *_, keys = passed(name)
    assert len(keys) == OBJECTIVES[name][1]


# --- Pairs and samples.


def test_the_null_condition_stands_beside_each_condition():
    y = {"context": jnp.arange(12.0).reshape(2, 3, 2), "mask": jnp.ones((2, 3), bool)}
    pairs = conditioning.paired(y, NULL)
    nulls = conditioning.nulls(NULL, 2)
    for name in y:
        np.testing.assert_array_equal(pairs[name][0::2], y[name])
        np.testing.assert_array_equal(pairs[name][1::2], nulls[name])
        np.testing.assert_array_equal(nulls[name], np.zeros_like(y[name]))
    np.testing.assert_array_equal(conditioning.paired(jnp.array([4, 5]), np.int32(9)), [4, 9, 5, 9])


def test_samples_have_labels_or_the_conditions_of_held_out_examples():
    def held_out(num, shuffled):
        return {"context": np.full((num, 3, 2), 7.0 + shuffled)}

    def none_held_out(num, shuffled):
        raise AssertionError("labels need no data")

    labels, text = Conditions.labels(3), Conditions(NULL)
    np.testing.assert_array_equal(conditioning.chosen(None, 5, labels, 0, none_held_out), [0, 1, 2, 0, 1])
    uniform = [conditioning.chosen("uniform", num, labels, 8, none_held_out) for num in (5, 50)]
    np.testing.assert_array_equal(uniform[0], uniform[1][:5])
    of_seed = np.random.Generator(np.random.Philox(8)).integers(0, 3, 50)
    np.testing.assert_array_equal(uniform[1], of_seed, "another draw than that of earlier samples of this seed")
    for rule in ("balanced", "uniform"):
        assert conditioning.labels(rule, 3, 0, seed=8).tolist() == [0, 0, 0], "without classes, the null label"
    assert set(uniform[1]) == {0, 1, 2}
    for rule, conditions in ((None, text), ("data", text), ("data", labels), ("shuffled", text), ("shuffled", labels)):
        found = conditioning.chosen(rule, 5, conditions, 0, held_out)["context"]
        np.testing.assert_array_equal(found, np.full((5, 3, 2), 8.0 if rule == "shuffled" else 7.0))
    with pytest.raises(ConfigError, match=r"labels = 'balanced' is for labels, .* use 'data' or 'shuffled'"):
        conditioning.chosen("balanced", 5, text, 0, held_out)
    with pytest.raises(ConfigError, match="labels = 'balancd' is unknown; did you mean 'balanced'"):
        conditioning.chosen("balancd", 5, labels, 0, held_out)


def test_conditions_are_taken_in_turn():
    y = {"context": np.arange(6).reshape(3, 2), "mask": np.array([True, False, False])}
    found = conditioning.taken(y, 2, 3)
    np.testing.assert_array_equal(found["context"], y["context"][[2, 0, 1]])
    np.testing.assert_array_equal(found["mask"], [False, True, False])


def test_guidance_needs_something_to_guide_to():
    none = Conditions.labels(0)
    for scale, conditions in (
        (0.0, Conditions.labels(3)),
        (0.5, Conditions(NULL)),
        (4.0, Conditions.labels(1)),
        (1.0, none),
    ):
        conditioning.check_guidance(scale, conditions, True)
    for scale in (0.5, 2.0):
        with pytest.raises(ConfigError, match=f"cfg_scale = {scale}: must be 1, because the data have no classes"):
            conditioning.check_guidance(scale, none, True)
    with pytest.raises(ConfigError, match=r"cfg_scale = -0\.1: must be at least 0"):
        conditioning.check_guidance(-0.1, Conditions.labels(3), True)
