"""What a network predicts and which time it gets: each regression, its weights, its training times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.api import Context
from diversedit_jax.diffusion import discrete, paths
from diversedit_jax.diffusion.predictions import AverageVelocity, Diffusion, Flow, network_time
from diversedit_jax.errors import ConfigError
from diversedit_jax.objectives import flow_matching
from diversedit_jax.objectives.flow_matching import ERRORS, WEIGHTS, regress

SHAPE = (5, 4, 4, 2)


def inputs():
    rng = np.random.default_rng(0)
    x, noise, guess = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(3))
    return x, noise, guess, jnp.linspace(0.1, 0.9, SHAPE[0]), jnp.zeros(SHAPE[0], jnp.int32)


def convert(path, v, x_t, t, prediction):
    """A velocity as another prediction."""
    t = paths.over(t, x_t)
    if prediction == "velocity":
        return v
    return getattr(paths, f"{prediction}_from_velocity")(path, v, x_t, t)


@pytest.mark.parametrize("name", paths.PATHS)
@pytest.mark.parametrize("prediction", ["noise", "score"])
def test_the_velocity_weight_makes_the_loss_that_of_the_velocity(name, prediction):
    path = paths.make(name)
    x, noise, guess, t, y = inputs()

    def loss(predicted, weight):
        def network(x_t, t, y):
            return convert(path, guess, x_t, t, predicted), ()

        return regress(network, path, x, noise, t, y, ERRORS[predicted], WEIGHTS[weight]).loss

    np.testing.assert_allclose(loss(prediction, "velocity"), loss("velocity", "none"), rtol=1e-4)
    # drift_var = D sigma / alpha; SiT: velocity (drift_var / sigma)^2, likelihood drift_var / sigma^2
    drift_var = paths.wronskian(path, t) * path.sigma(t) / path.alpha(t)
    plain = loss(prediction, "none")
    np.testing.assert_allclose(loss(prediction, "velocity"), (drift_var / path.sigma(t)) ** 2 * plain, rtol=1e-5)
    np.testing.assert_allclose(loss(prediction, "likelihood"), drift_var / path.sigma(t) ** 2 * plain, rtol=1e-5)


@pytest.mark.parametrize("name", paths.PATHS)
@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_the_truth_has_no_loss_and_the_loss_is_in_units_of_what_is_predicted(name, prediction):
    path = paths.make(name)
    x, noise, _, t, y = inputs()
    true_velocity = paths.velocity(path, x, noise, t)

    def network(x_t, t, y):
        return convert(path, true_velocity, x_t, t, prediction), ()

    np.testing.assert_allclose(regress(network, path, x, noise, t, y, ERRORS[prediction]).loss, 0, atol=1e-7)
    if prediction != "velocity":
        silent = regress(lambda x, t, y: (0 * x, ()), path, x, noise, t, y, ERRORS[prediction])
        unit = x if prediction == "data" else noise
        np.testing.assert_allclose(silent.loss, jnp.mean(unit**2, axis=(1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("weight", ["none", "likelihood"])
@pytest.mark.parametrize(("path", "prediction"), [("linear", "noise"), ("cosine", "score"), ("vp", "noise")])
def test_training_times_stay_within_the_cut_off(path, prediction, weight):
    objective = flow_matching.make(path=path, prediction=prediction, weight=weight)
    batch = {"x": jnp.ones((4096, 1, 1, 1)), "y": jnp.zeros(4096, jnp.int32)}
    forward = objective.apply(lambda x, t, y: (0 * x, ()), batch, Context(jax.random.key(0), np.int32(3)))
    low, high = paths.training_times(paths.make(path), prediction)
    assert low <= forward.t.min() < low + 1e-3
    assert high - 1e-3 < forward.t.max() <= high
    assert jnp.isfinite(forward.loss).all()


def test_a_network_of_steps_gets_the_nearest_step_of_a_time():
    t = jnp.array([0.0, 0.3, 0.9, 1.0])
    np.testing.assert_array_equal(network_time(Diffusion(discrete.linear(1000)), t), [0, 300, 899, 999])
    for predicts in (Flow(), AverageVelocity()):
        assert network_time(predicts, t) is t


def test_the_network_of_a_flow_is_given_its_own_unit_of_time():
    batch = {"x": jnp.ones((64, 1)), "y": jnp.zeros(64, jnp.int32)}
    objective = flow_matching.make(path="vp", prediction="noise", time_scale=999.0)

    def network(x, t, y):
        return t[:, None], ()

    forward = objective.apply(network, batch, Context(jax.random.key(0), np.int32(3)))
    assert 0 <= forward.t.min() < 0.1
    assert 0.9 < forward.t.max() <= 1
    np.testing.assert_allclose(forward.loss, (999 * forward.t - forward.noise[:, 0]) ** 2, rtol=1e-5)
    np.testing.assert_allclose(forward.rerun(network, forward.t / 2)[0][:, 0], 999 * forward.t / 2, rtol=1e-6)
    assert objective.predicts == Flow(paths.make("vp"), "noise", time_scale=999.0)
    with pytest.raises(ConfigError, match=r"time_scale = 0\.0: must be more than 0"):
        flow_matching.make(time_scale=0.0)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ConfigError, match="weight = 'likelihood' is for noise and score errors"):
        flow_matching.make(weight="likelihood")
    with pytest.raises(ConfigError, match="weight = 'velocty' is unknown; did you mean 'velocity'"):
        flow_matching.make(prediction="noise", weight="velocty")
    x, noise, _, t, y = inputs()
    with pytest.raises(ConfigError, match=r"predicts \(4, 4, 4\), but flow matching needs \(4, 4, 2\)"):
        regress(lambda x, t, y: (jnp.concatenate([x, x], -1), ()), paths.make("linear"), x, noise, t, y)
