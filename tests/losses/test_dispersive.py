"""Dispersive Loss: the spec's numbers, the naive form in float64, the limits of each form, its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import losses
from diversedit_jax.api import Context
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses.dispersive import FORMS, dispersive_loss, squared_distances
from tests.losses.test_conformance import BATCH, batch, features, forward


def oracle() -> np.ndarray:
    """Two blocks' features of two examples each, [4 4 8], by the formula of the method's numeric oracle."""
    n, t, k = np.ogrid[:2, :4, :8]

    def block(m: int) -> np.ndarray:
        return np.sin(0.07 * (m + 1) * (k + 1) + 0.37 * n + 0.11 * t * (m + 1)) + 0.3 * np.cos(0.05 * k * t + 0.2 * m)

    return np.concatenate([block(5), block(6)])


@pytest.mark.parametrize(("tau", "wanted"), [(1.0, -0.0980662641), (0.5, -0.1843660505)])
def test_infonce_equals_the_oracle(tau, wanted):
    assert dispersive_loss(oracle(), tau=tau) == pytest.approx(wanted, abs=2e-7)


def naive(z: np.ndarray, form: str, tau: float = 0.5, margin: float = 1.0, diagonal: bool = True) -> float:
    """Each form written out over pairs, in float64."""
    z = z.astype(np.float64).reshape(len(z), -1)
    lengths = np.linalg.norm(z, axis=1, keepdims=True)
    if form == "covariance":
        cov = np.cov((z / lengths).T, bias=True)
        return np.sum(cov**2) - np.sum(np.diag(cov) ** 2)
    l2 = ((z[:, None] - z[None]) ** 2).mean(axis=2)
    distances = 1 - (z / lengths) @ (z / lengths).T if form == "infonce_cosine" else l2
    distances = distances[np.ones_like(distances, bool) if diagonal else ~np.eye(len(z), dtype=bool)]
    if form == "hinge":
        return np.mean(np.maximum(margin - distances, 0) ** 2)
    return np.log(np.mean(np.exp(-distances / tau)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("diagonal", [True, False])
def test_each_form_equals_the_sum_over_pairs(form, diagonal):
    z = np.random.default_rng(0).standard_normal((6, 5, 3), dtype=np.float32)
    found = dispersive_loss(z, form, tau=0.7, margin=2.5, diagonal=diagonal)
    assert found == pytest.approx(naive(z, form, 0.7, 2.5, diagonal), rel=1e-5)


def test_distances_are_exact_where_what_is_shared_is_large():
    """Features of trained networks: examples differ by 1% of what they share."""
    rng = np.random.default_rng(0)
    z = (100 * rng.standard_normal((1, 4096)) + rng.standard_normal((8, 4096))).astype(np.float32)
    z[1] = z[0]
    wanted = ((z[:, None].astype(np.float64) - z[None]) ** 2).sum(axis=2)
    found = np.asarray(squared_distances(jnp.asarray(z)))
    assert (np.diag(found) == 0).all()
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-3)  # of distances of about 8000
    half = dispersive_loss(jnp.asarray(z, jnp.bfloat16))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("form", ["infonce_l2", "infonce_cosine"])
def test_infonce_is_0_for_equal_features_and_minus_log_b_for_distant_ones(form):
    same = jnp.ones((8, 4, 2))
    assert dispersive_loss(same, form) == pytest.approx(0, abs=1e-6)
    apart = 100 * jnp.eye(8)[:, :, None]
    assert dispersive_loss(apart, form, tau=0.01) == pytest.approx(-np.log(8), abs=1e-5)
    assert dispersive_loss(apart[:1], form) == 0, "one example has nothing to leave"


@pytest.mark.parametrize("form", FORMS)
def test_a_step_down_the_gradient_disperses(form):
    z = 0.3 * jax.random.normal(jax.random.key(0), (6, 4, 3)) + 1
    value, gradient = jax.value_and_grad(dispersive_loss)(z, form)
    assert dispersive_loss(z - 0.1 * gradient / jnp.abs(gradient).max(), form) < value


@pytest.mark.parametrize("form", FORMS)
def test_equal_examples_give_a_finite_gradient(form):
    gradient = jax.grad(dispersive_loss)(jnp.ones((4, 3, 2)), form)
    assert jnp.isfinite(gradient).all()


def test_distances_are_per_element_or_whole():
    z = oracle()
    assert dispersive_loss(z, tau=1.0) == pytest.approx(
        float(dispersive_loss(z, tau=32.0, per_element=False)), rel=1e-5
    )


def test_several_blocks_give_their_mean():
    def value(**options):
        loss = losses.make("dispersive", **options)
        return loss, loss.apply(forward(features()), batch(), Context(jax.random.key(0)))

    both, (total, metrics, *_) = value(blocks=(2, 5))
    assert both.blocks == (2, 5)
    assert total == pytest.approx(np.mean([value(blocks=(k,))[1].loss for k in (2, 5)]), rel=1e-6)
    assert total == pytest.approx(0.5 * float(metrics["loss"]), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "infonce_l2", "tau": 0.7, "diagonal": False, "groups": 2},
        {"form": "hinge", "margin": 2000.0, "per_element": False, "diagonal": False},
    ],
    ids=lambda options: options["form"],
)
def test_every_option_reaches_the_loss(options):
    term = losses.make("dispersive", blocks=(2,), coefficient=0.3, **options).apply(
        forward(features()), batch(), Context(jax.random.key(0))
    )
    wanted = float(dispersive_loss(features()[2], **options))
    assert wanted != 0
    assert float(term.loss) == pytest.approx(0.3 * wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "hinges"}, "form = 'hinges' is unknown; did you mean 'hinge'"),
        ({"blocks": ()}, r"blocks = \(\) must name at least one block"),
        ({"tau": 0.0}, "tau = 0.0: must be more than 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        losses.make("dispersive", **options)


def test_batches_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="groups = 3 must divide the batch of 8"):
        dispersive_loss(features()[0], groups=3)
    with pytest.raises(ValueError, match="examples in a group = 1: must be at least 2"):
        dispersive_loss(features()[0], groups=BATCH, diagonal=False)
