"""Flow matching: the path and its derivative, times, label drop, the loss per example, one result on all meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax import conditioning, objectives, sharding
from diversedit_jax.api import Context
from diversedit_jax.diffusion import paths, times
from diversedit_jax.errors import ConfigError
from diversedit_jax.objectives.flow_matching import ERRORS, WEIGHTS, regress

CLASSES, SHAPE = 7, (4, 6, 2)
NULL = np.int32(CLASSES)


def batch(b: int = 8):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((b, *SHAPE), dtype=np.float32), rng.integers(CLASSES, size=b, dtype=np.int32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def network(x_t, t, y):
    """A network whose prediction depends on all that it is given."""
    scale = (1 + t + 0.1 * y)[:, None, None, None]
    return jnp.sin(x_t) * scale, (x_t.reshape(len(x_t), -1, 2), t[:, None, None])


@pytest.mark.parametrize("name", ["linear", "cosine"])  # the VP path ends near the noise: tests/diffusion/test_paths.py
def test_path_runs_from_data_to_noise(name):
    path, x, noise = paths.make(name), batch()["x"], jax.random.normal(jax.random.key(1), (8, *SHAPE))
    at = [paths.interpolate(path, x, noise, jnp.full(8, t)) for t in (0.0, 1.0)]
    np.testing.assert_allclose(at[0], x, atol=1e-6)
    np.testing.assert_allclose(at[1], noise, atol=1e-6)
    middle = paths.interpolate(path, x, noise, jnp.full(8, 0.25))
    alpha, sigma = {"linear": (0.75, 0.25), "cosine": (np.cos(np.pi / 8), np.sin(np.pi / 8))}[name]
    np.testing.assert_allclose(middle, alpha * x + sigma * noise, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", paths.PATHS)
def test_target_is_the_derivative_of_the_path(name):
    with jax.enable_x64(True):
        path, step = paths.make(name), 1e-5
        x, noise = (jax.random.normal(jax.random.key(i), (8, *SHAPE)) for i in (1, 2))
        t = jnp.linspace(0.05, 0.95, 8)
        ends = [paths.interpolate(path, x, noise, t + h) for h in (-step, step)]
        np.testing.assert_allclose(paths.velocity(path, x, noise, t), (ends[1] - ends[0]) / (2 * step), atol=1e-8)
        for curve, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
            np.testing.assert_allclose(jax.vmap(jax.grad(curve))(t), derivative(t), atol=1e-12)


@pytest.mark.parametrize("name", paths.PATHS)
def test_score_from_velocity_on_a_gaussian(name):
    """Data of N(mean, std^2): the marginal at t is N(alpha mean, alpha^2 std^2 + sigma^2), its velocity is known."""
    mean, std, path = 0.7, 0.4, paths.make(name)
    with jax.enable_x64(True):
        x = jnp.linspace(-3, 3, 11)
        for t in map(jnp.asarray, (0.05, 0.3, 0.7, 1.0)):
            alpha, sigma, d_alpha, d_sigma = (curve(t) for curve in path[:4])
            variance = (alpha * std) ** 2 + sigma**2
            gain = (d_alpha * alpha * std**2 + d_sigma * sigma) / variance
            v = d_alpha * mean + gain * (x - alpha * mean)
            score = paths.score_from_velocity(path, v, x, t)
            np.testing.assert_allclose(score, -(x - alpha * mean) / variance, rtol=1e-9, atol=1e-9, err_msg=f"t = {t}")


# --- What is drawn.

COUNT = 100_000


def draw(batch, key, **options):
    """The forward pass of the objective."""
    return objectives.make("flow_matching", **options).apply(network, batch, Context(key, NULL))


def kolmogorov(sample, cdf) -> float:
    """The largest distance between the distribution of a sample and `cdf`."""
    values = cdf(np.sort(np.asarray(sample, np.float64)))
    steps = np.arange(len(values) + 1) / len(values)
    return max(np.abs(values - steps[1:]).max(), np.abs(values - steps[:-1]).max())


def logit_normal_cdf(mean, std):
    normal_cdf = jax.jit(jax.scipy.stats.norm.cdf)
    return lambda t: np.asarray(normal_cdf((np.log(t / (1 - t)) - mean) / std), np.float64)


@pytest.mark.parametrize(
    ("name", "mean", "std", "cdf"),
    [
        ("uniform", 0.0, 1.0, lambda t: t),
        ("logit_normal", 0.0, 1.0, logit_normal_cdf(0.0, 1.0)),
        ("logit_normal", -0.4, 1.4, logit_normal_cdf(-0.4, 1.4)),
    ],
)
def test_distribution_of_times(name, mean, std, cdf):
    t = times.make(name, mean=mean, std=std)(jax.random.key(0), COUNT)
    assert t.min() >= 0
    assert t.max() < 1
    assert t.min() < 0.02 < 0.98 < t.max()
    # Kolmogorov and Smirnov's 99.9% bound
    assert kolmogorov(t, cdf) < 1.95 / COUNT**0.5


def test_label_drop():
    y = jnp.arange(COUNT) % CLASSES
    examples, context = {"x": jnp.zeros((COUNT, 1)), "y": y}, Context(jax.random.key(1), NULL)
    dropped = conditioning.drop(jax.random.key(0), examples, context, 0.1)
    changed = np.asarray(dropped != y)
    assert (dropped[changed] == CLASSES).all(), "a dropped label is not the null label"
    # four standard deviations of a share of 0.1
    assert abs(changed.mean() - 0.1) < 4 * (0.09 / COUNT) ** 0.5
    rates = [changed[np.asarray(y) == label].mean() for label in range(CLASSES)]
    np.testing.assert_allclose(
        rates, 0.1, atol=4 * (0.09 * CLASSES / COUNT) ** 0.5, err_msg="the rate depends on the label"
    )


@pytest.mark.parametrize(("rate", "labels"), [(0.0, None), (1.0, CLASSES)])
def test_label_drop_changes_labels_only(rate, labels):
    key = jax.random.key(3)
    some, result = (draw(batch(), key, condition_drop=p) for p in (0.5, rate))
    np.testing.assert_array_equal(result.y, batch()["y"] if labels is None else jnp.full(8, labels))
    for field in ("x", "noise", "t", "x_t"):
        np.testing.assert_array_equal(getattr(result, field), getattr(some, field), err_msg=field)


def test_every_example_has_its_own_noise_and_time():
    result = draw(batch(64), jax.random.key(0))
    assert len(np.unique(result.t)) == 64
    assert len(np.unique(np.asarray(result.noise))) == result.noise.size
    assert abs(float(result.noise.mean())) < 4 / result.noise.size**0.5
    assert abs(float(result.noise.std()) - 1) < 4 / (2 * result.noise.size) ** 0.5


# --- The loss.


@pytest.mark.parametrize("name", paths.PATHS)
def test_loss_is_a_mean_over_each_examples_elements(name):
    result = draw(batch(), jax.random.key(0), path=name)
    path = paths.make(name)
    prediction, features = network(result.x_t, result.t, result.y)
    target = paths.velocity(path, result.x, result.noise, result.t)
    wanted = [np.mean((prediction[i] - target[i]) ** 2) for i in range(8)]
    np.testing.assert_allclose(result.loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(
        result.x_t, paths.interpolate(path, result.x, result.noise, result.t), rtol=1e-6, atol=1e-6
    )
    assert_equal(result.features, features)
    np.testing.assert_array_equal(result.x, batch()["x"])

    perfect = lambda x_t, t, y: (target, ())  # noqa: E731
    zero = regress(perfect, path, result.x, result.noise, result.t, result.y)
    assert not np.any(zero.loss)


@pytest.mark.parametrize(
    ("path", "prediction", "weight"),
    [("cosine", "noise", "likelihood"), ("vp", "score", "velocity"), ("linear", "data", "none")],
)
def test_path_prediction_and_weight_reach_the_loss(path, prediction, weight):
    result = draw(batch(), jax.random.key(0), path=path, prediction=prediction, weight=weight)
    given = paths.make(path), result.x, result.noise, result.t, result.y, ERRORS[prediction], WEIGHTS[weight]
    np.testing.assert_allclose(result.loss, regress(network, *given).loss, rtol=1e-6)
    np.testing.assert_allclose(result.x_t, paths.interpolate(*given[:4]), rtol=1e-6)


@pytest.mark.parametrize("name", ["flow_matching", "reg", "mean_flow"])
def test_mean_and_deviation_reach_the_times(name):
    def zero(x_t, t, y, *, span=None, token=None):
        return (0 * x_t if token is None else (0 * x_t, 0 * token)), ()

    options = {"time": "logit_normal", "time_mean": 1.5, "time_std": 1e-3} | ({"width": 2} if name == "reg" else {})
    given = batch() | {"token/dinov2": jnp.ones((8, 2))}
    t = objectives.make(name, **options).apply(zero, given, Context(jax.random.key(0), NULL)).t
    logits = np.log(t / (1 - t))
    assert 0 < np.abs(logits - 1.5).max() < 6e-3  # six deviations


def test_a_bfloat16_prediction_is_compared_in_float32():
    low = lambda x_t, t, y: (network(x_t, t, y)[0].astype(jnp.bfloat16), ())  # noqa: E731
    result = objectives.make("flow_matching").apply(low, batch(), Context(jax.random.key(0), NULL))
    assert result.loss.dtype == jnp.float32


def assert_equal(found, wanted, exactly: bool = True):
    compare = (
        np.testing.assert_array_equal
        if exactly
        else lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    )
    jax.tree.map(compare, found, wanted)


def test_one_key_one_result_also_on_eight_devices():
    run = partial(draw, condition_drop=0.5)
    result = run(batch(16), jax.random.key(5))
    assert_equal(result, run(batch(16), jax.random.key(5)))
    other = run(batch(16), jax.random.key(6))
    for field in ("t", "noise", "y"):
        assert np.any(np.asarray(getattr(other, field) != getattr(result, field))), f"the key does not reach {field}"

    layout = sharding.make()
    assert layout.mesh.size == 8
    shard = jax.device_put(batch(16), sharding.over_batch(layout))
    spread = jax.jit(run)(shard, jax.device_put(jax.random.key(5), sharding.replicated(layout)))
    assert len(spread.loss.sharding.device_set) == 8
    for field in ("t", "noise", "y"):
        wanted = getattr(result, field)
        np.testing.assert_allclose(
            getattr(spread, field), wanted, rtol=1e-6, atol=1e-7, err_msg=f"{field}: drawn differently"
        )
    assert_equal(spread, result, exactly=False)
    assert_equal(jax.jit(run)(batch(16), jax.random.key(5)), result, exactly=False)


# --- Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "liner"}, "path = 'liner' is unknown; did you mean 'linear'"),
        ({"time": "lognormal"}, "time = 'lognormal' is unknown; did you mean 'logit_normal'"),
        ({"time": "logit_normal", "time_std": 0.0}, "time_std = 0.0: must be more than 0"),
        ({"condition_drop": 1.5}, "condition_drop = 1.5: must be at least 0 and at most 1"),
        ({"condition_drop": -0.1}, "condition_drop = -0.1: must be at least 0 and at most 1"),
        (
            {"drop": 0.1},
            "objectives.flow_matching: no option 'drop'; known: path, prediction, weight, time",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        objectives.make("flow_matching", **options)
