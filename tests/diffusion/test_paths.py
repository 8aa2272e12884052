"""Paths and what networks predict on them: derivatives, inverse pairs, the exact Gaussian, the ends of the interval."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.diffusion import paths
from diversedit_jax.errors import ConfigError

MEAN, STD = 0.7, 0.4


@pytest.mark.parametrize("name", paths.PATHS)
def test_derivatives_are_the_derivatives(name):
    path = paths.make(name)
    with jax.enable_x64(True):
        for t in jnp.linspace(0.01, 1.0, 23):
            np.testing.assert_allclose(path.d_alpha(t), jax.grad(path.alpha)(t), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(path.d_sigma(t), jax.grad(path.sigma)(t), rtol=1e-9, atol=1e-12)
            assert paths.wronskian(path, t) > 0


@pytest.mark.parametrize("name", paths.PATHS)
def test_paths_go_from_data_to_noise(name):
    path = paths.make(name)
    zero, one = jnp.float32(0), jnp.float32(1)
    assert (path.alpha(zero), path.sigma(zero)) == (1, 0)
    np.testing.assert_allclose(path.alpha(one), np.exp(-0.25 * 19.9 - 0.05) if name == "vp" else 0, rtol=1e-6)
    np.testing.assert_allclose(path.sigma(one), 1, rtol=1e-4)


@pytest.mark.parametrize(("name", "curve"), [("cosine", "alpha"), ("cosine", "d_sigma"), ("vp", "sigma")])
def test_single_precision_is_kept_where_a_curve_vanishes(name, curve):
    near = 1 - np.float32(1e-3) if name == "cosine" else np.float32(1e-5)
    single = getattr(paths.make(name), curve)(jnp.float32(near))
    with jax.enable_x64(True):
        double = getattr(paths.make(name), curve)(jnp.float64(near))
    np.testing.assert_allclose(float(single), float(double), rtol=1e-6)


def gaussian(path, x, t):
    """Velocity, noise, score and data expected at x_t, for data N(MEAN, STD^2)."""
    alpha, sigma, d_alpha, d_sigma = (curve(t) for curve in path[:4])
    variance = alpha**2 * STD**2 + sigma**2
    score = -(x - alpha * MEAN) / variance
    data = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
    noise = -sigma * score
    return d_alpha * data + d_sigma * noise, noise, score, data


@pytest.mark.parametrize("name", paths.PATHS)
@pytest.mark.parametrize("t", [1e-3, 0.3, 0.9, 1 - 1e-3])
def test_conversions_are_those_of_a_gaussian(name, t):
    path = paths.make(name)
    with jax.enable_x64(True):
        t, x = jnp.float64(t), jnp.linspace(-2.0, 2.0, 8)
        v, noise, score, data = gaussian(path, x, t)
        for found, wanted in [
            (paths.noise_from_velocity(path, v, x, t), noise),
            (paths.score_from_velocity(path, v, x, t), score),
            (paths.data_from_velocity(path, v, x, t), data),
            (paths.velocity_from_noise(path, noise, x, t), v),
            (paths.velocity_from_score(path, score, x, t), v),
        ]:
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", paths.PATHS)
def test_conversions_are_inverse_pairs_in_single_precision_up_to_the_cut_off(name):
    path, rng = paths.make(name), np.random.default_rng(0)
    x, prediction = (jnp.asarray(rng.standard_normal((4, 2, 2, 1)), jnp.float32) for _ in range(2))
    low, high = paths.sampling_times(path, "noise")
    t = paths.over(jnp.array([low, 0.2, 0.8, high]), x)
    v = paths.velocity_from_noise(path, prediction, x, t)
    np.testing.assert_allclose(paths.noise_from_velocity(path, v, x, t), prediction, atol=3e-6)
    v = paths.velocity_from_score(path, prediction, x, t)
    np.testing.assert_allclose(paths.score_from_velocity(path, v, x, t), prediction, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("prediction", paths.PREDICTIONS)
def test_a_network_of_any_prediction_becomes_a_velocity(prediction):
    path = paths.make("cosine")
    place = paths.PREDICTIONS.index(prediction)

    def network(x, t, y):
        return gaussian(path, x, paths.over(t, x))[place], (x,)

    x, t, y = jnp.ones((3, 2, 2, 1)), jnp.array([0.1, 0.5, 0.9]), jnp.zeros(3, jnp.int32)
    v, features = paths.as_velocity(network, path, prediction)(x, t, y)
    np.testing.assert_allclose(v, gaussian(path, x, paths.over(t, x))[0], rtol=1e-5)
    assert len(features) == 1


def test_the_cut_offs_are_sits():
    """In our direction of time: SiT's VP ends at 1 - eps, where the data is."""
    linear, cosine, vp = paths.PATHS.values()
    assert paths.training_times(linear, "velocity") == paths.sampling_times(cosine, "velocity") == (0, 1)
    assert paths.training_times(linear, "score") == paths.sampling_times(cosine, "noise") == (1e-3, 1 - 1e-3)
    assert paths.training_times(linear, "data") == (0, 1)
    assert paths.sampling_times(linear, "data") == paths.sampling_times(cosine, "data") == (1e-3, 1)
    for prediction in paths.PREDICTIONS:
        assert paths.training_times(vp, prediction) == (1e-5, 1)
        assert paths.sampling_times(vp, prediction) == (1e-3, 1)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="path = 'gvp' is unknown; SiT's GVP is 'cosine'; known: linear, cosine, vp"):
        paths.make("gvp")
    with pytest.raises(ConfigError, match="prediction = 'nois' is unknown; did you mean 'noise'"):
        paths.as_velocity(lambda x, t, y: (x, ()), paths.make("linear"), "nois")
