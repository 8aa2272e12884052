"""REPA's loss: equal to the reference (also in test_golden_sit), its targets, its schedule, its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import losses
from diversedit_jax.api import Context
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses import repa
from diversedit_jax.losses._shared import head, init_head, unit
from tests.losses.test_conformance import BATCH, TOKENS, WIDTH, batch, features, forward

K = batch()["features/dinov2"].shape[-1]


def apply(given=None, step: int = 0, **options):
    loss = losses.make("repa", width=8, **options)
    whole, given = forward(features()), batch() if given is None else given
    params = loss.init(jax.random.key(0), whole, given)
    return params, loss.apply(whole, given, Context(key=jax.random.key(1), step=jnp.int32(step), params=params))


def test_the_projector_is_three_layers_born_as_xavier_has_it():
    params = repa.init_projector(jax.random.key(0), 768, 2048, 768)
    assert [leaf["kernel"].shape for leaf in params.values()] == [(768, 2048), (2048, 2048), (2048, 768)]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(7.34e6, rel=1e-3)  # of SiT-B
    for layer in params.values():
        bound = np.sqrt(6 / sum(layer["kernel"].shape))
        assert 0.99 * bound < jnp.abs(layer["kernel"]).max() <= bound
        assert jnp.std(layer["kernel"]) == pytest.approx(bound / np.sqrt(3), rel=0.01)
        assert not layer["bias"].any()


def test_a_head_in_half_precision_is_near_the_one_in_full():
    params, x = init_head(jax.random.key(0), (24, 48, 24)), features()[1]
    full, half = head(params, x), head(params, x, jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 0 < jnp.abs(half - full).max() < 0.05 * jnp.abs(full).max()


def test_alignment_is_minus_the_mean_cosine_of_each_example():
    z, targets = (jax.random.normal(jax.random.key(i), (3, 4, 5)) for i in range(2))
    cosines = [[np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*p)] for p in zip(z, targets)]  # noqa: B905
    np.testing.assert_allclose(repa.repa_loss(z, targets), -np.mean(cosines, axis=1), rtol=1e-5)
    np.testing.assert_allclose(repa.repa_loss(z, 7 * z), -1, rtol=1e-6)
    gradient = jax.grad(lambda z: repa.repa_loss(z, targets).sum())(jnp.zeros((3, 4, 5)))
    assert not gradient.any(), "a zero vector has no direction and no gradient"


def test_short_vectors_have_a_direction_down_to_1e_12():
    vectors = jnp.array([[3e-8, 4e-8], [3e-13, 4e-13], [0, 0]])
    np.testing.assert_allclose(unit(vectors), [[0.6, 0.8], [0, 0], [0, 0]], rtol=1e-6)


def test_nt_xent_is_a_token_s_search_for_its_target_in_its_image():
    z, targets = (jax.random.normal(jax.random.key(i), (3, 4, 5)) for i in range(2))
    found = repa.repa_loss(z, targets, "nt_xent", tau=0.5)
    for image in range(3):
        a, b = (x[image] / jnp.linalg.norm(x[image], axis=1, keepdims=True) for x in (z, targets))
        chosen = jax.nn.softmax(a @ b.T / 0.5, axis=1)[jnp.arange(4), jnp.arange(4)]
        np.testing.assert_allclose(found[image], -jnp.log(chosen).mean(), rtol=1e-5)
    assert (repa.repa_loss(targets, targets, "nt_xent") < found).all()
    with pytest.raises(ConfigError, match=r"similarity = 'nt_xnt' is unknown; did you mean 'nt_xent'"):
        losses.make("repa", similarity="nt_xnt")


def test_the_class_token_is_the_first_target():
    given = batch()
    with_token = repa.targets_of(given, "dinov2", class_token=True)
    assert with_token.shape == (BATCH, 1 + TOKENS, K)
    np.testing.assert_array_equal(with_token[:, 0], given["token/dinov2"])
    np.testing.assert_array_equal(with_token[:, 1:], given["features/dinov2"])
    with pytest.raises(ConfigError, match=rf"\[{BATCH}, 16, {K}\].* \[{BATCH}, 17, {K}\].*one token for each"):
        apply(class_token=True)
    _, term = apply(given | {"features/dinov2": with_token[:, 1:]})
    _, same = apply(given | {"features/dinov2": given["features/dinov2"][:, 1:]}, class_token=True)
    assert term.loss != same.loss


def test_a_batch_without_the_features_says_what_to_configure():
    with pytest.raises(ConfigError, match=r"has .*x, y, and not features/mae: configure config\.encoders\.mae"):
        apply(encoder="mae")
    given = {key: value for key, value in batch().items() if key != "token/dinov2"}
    with pytest.raises(ConfigError, match=r"has .*x, y, and not token/dinov2: configure config\.encoders\.dinov2"):
        apply(given, class_token=True)


def test_the_schedule_rises_holds_falls_and_ends_at_exactly_zero():
    weights = [repa.weight_at(step, 0.5, warmup_steps=4, until=20, decay_steps=10) for step in range(22)]
    np.testing.assert_allclose(weights[:5], np.array([0, 1, 2, 3, 4]) / 8, rtol=1e-6)
    np.testing.assert_allclose(weights[4:11], 0.5)
    np.testing.assert_allclose(weights[10:20], 0.5 * np.arange(10, 0, -1) / 10, rtol=1e-6)
    assert weights[20] == weights[21] == 0
    assert [repa.weight_at(step, 0.5, until=20) for step in (0, 19, 20)] == [0.5, 0.5, 0]
    assert repa.weight_at(10**6, 0.5) == 0.5


def test_after_the_stop_neither_loss_nor_gradient_is_left():
    _, term = apply(step=99, until=100)
    assert term.loss == pytest.approx(0.5 * float(term.metrics["loss"]), rel=1e-6)
    stopped = losses.make("repa", width=8, until=100)
    params = stopped.init(jax.random.key(0), forward(features()), batch())

    def value(params, features):
        term = stopped.apply(forward(features), batch(), Context(jax.random.key(0), step=jnp.int32(100), params=params))
        return term.loss, term

    (loss, term), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, features())
    assert loss == 0
    assert term.full == 0.5 * term.metrics["loss"] != 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


def test_every_option_reaches_the_loss():
    schedule = {"warmup_steps": 10, "until": 100, "decay_steps": 50}
    options = {"similarity": "nt_xent", "tau": 0.3, "coefficient": 0.2, "dtype": "bfloat16"} | schedule
    for step in (5, 75):
        params, term = apply(step=step, **options)
        z = repa.project(params, features()[8], jnp.bfloat16)
        loss = repa.repa_loss(z, batch()["features/dinov2"], "nt_xent", 0.3).mean()
        np.testing.assert_allclose(term.loss, repa.weight_at(step, 0.2, **schedule) * loss, rtol=1e-6)
        np.testing.assert_allclose(term.full, 0.2 * loss, rtol=1e-6)
    assert losses.make("repa", class_token=True).reads == ("token/dinov2", "features/dinov2")
    assert losses.make("repa").reads == ("features/dinov2",)


def test_only_its_block_is_read():
    assert losses.make("repa", block=4).blocks == (4,)
    params, _ = apply(block=4)
    assert params["fc1"]["kernel"].shape == (WIDTH, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_steps": 5}, "decay_steps = 5 needs `until`, which is not set"),
        ({"warmup_steps": -1}, "warmup_steps = -1: must be at least 0"),
        ({"width": 0}, "width = 0: must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        losses.make("repa", **options)
