"""Samplers: equal to REPA's, of the stated order, unchanged by guiding a network by itself, true to the marginal."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.diffusion import paths, solve, solvers
from diversedit_jax.diffusion.guidance import guide, over_span
from diversedit_jax.diffusion.predictions import Flow
from diversedit_jax.diffusion.times import check_interval
from diversedit_jax.errors import ConfigError
from tests import reference

LINEAR = paths.make("linear")


@pytest.mark.parametrize(
    ("name", "skip"), [pytest.param("plain", "none", marks=pytest.mark.slow), ("diversedit", "release")]
)
def test_samplers_equal_the_reference(name, skip):
    gold = reference.numbers(f"samplers_{name}")
    network = reference.model(skip).network(reference.params(f"sit_{name}"))
    steps = int(gold["num_steps"])
    null, even, stochastic = np.int32(reference.NULL), solvers.uniform_times(steps), solvers.last_step_times(steps)

    @jax.jit
    def run(scale, low, high):
        velocity = guide(network, gold["y"], null, scale=scale, interval=(low, high))
        return {
            "euler": solvers.euler(velocity, gold["xT"], even),
            "heun": solvers.heun(velocity, gold["xT"], even),
            "sde": solvers.euler_maruyama(velocity, gold["xT"], stochastic, lambda i: gold["sde_eps"][i]),
        }

    plain, guided, heun = run(1.0, 0.0, 1.0), run(1.8, 0.0, 0.7), run(2.5, 0.2, 0.8)
    assert run._cache_size() == 1, "a scale or an interval compiled the sampler again"
    found = {"euler": plain["euler"], "sde": plain["sde"], "euler_cfg": guided["euler"], "sde_cfg": guided["sde"]}
    for key, ours in (found | {"heun_cfg": heun["heun"]}).items():
        scale = np.abs(gold[key]).max()
        np.testing.assert_allclose(ours / scale, gold[key] / scale, atol=1e-4, err_msg=key)


def gaussian_velocity(mean, std, path):
    """The exact velocity of x ~ N(mean, std^2), noise ~ N(0, 1): E[dx_t/dt | x_t]."""

    def velocity(x, t, t_step):
        alpha, sigma, d_alpha, d_sigma = (curve(t) for curve in path[:4])
        gain = (d_alpha * alpha * std**2 + d_sigma * sigma) / (alpha**2 * std**2 + sigma**2)
        return d_alpha * mean + gain * (x - alpha * mean)

    return velocity


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence_on_a_gaussian_flow(path, solver, order):
    mean, std = 0.7, 0.4
    with jax.enable_x64(True):
        noise = jnp.linspace(-2.0, 2.0, 16).reshape(1, 4, 4, 1)
        exact = mean + std * noise  # the flow of Gaussians maps standard deviations to standard deviations
        velocity = gaussian_velocity(mean, std, paths.make(path))
        errors = [
            float(jnp.abs(getattr(solvers, solver)(velocity, noise, solvers.uniform_times(n)) - exact).max())
            for n in (64, 128, 256)
        ]
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(slopes, order, atol=0.1, err_msg=f"errors {errors}")


def noise_of(shape):
    """Noise of a whole batch by one key: for many small images a key for each takes far longer."""
    return lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)


@pytest.mark.parametrize(
    ("path", "scale"),
    [
        pytest.param(path, scale, marks=[] if (path, scale) == ("cosine", 2.0) else pytest.mark.slow)
        for path in ("linear", "cosine")
        for scale in (0.0, 1.0, 2.0)
    ],
)
def test_the_sde_keeps_the_marginal(path, scale):
    mean, std, count = 0.7, 0.4, 40_000
    curve = paths.make(path)
    times, noise = solvers.last_step_times(400, last=0.005), noise_of((count, 1, 1, 1))
    velocity = gaussian_velocity(mean, std, curve)
    x = solvers.euler_maruyama(velocity, noise(400), times, noise, curve, diffusion=lambda t: scale * curve.sigma(t))
    # four standard errors, and the bias of a first-order method at 400 steps
    assert abs(float(x.mean()) - mean) < 4 * std / count**0.5 + 2e-3
    assert abs(float(x.std()) - std) < 4 * std / (2 * count) ** 0.5 + 2e-3


def test_an_images_noise_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(3), 6)
    whole = solvers.normal_per_image(keys, (2, 2, 1))(5)
    part = solvers.normal_per_image(keys[2:4], (2, 2, 1))(5)
    np.testing.assert_array_equal(whole[2:4], part)
    other = solvers.normal_per_image(keys, (2, 2, 1))(6)
    assert len(np.unique(np.asarray([whole, other]))) == 2 * whole.size, "images or steps share their noise"


def shift_network(x, t, y):
    """A network whose velocity is its label."""
    return jnp.broadcast_to(y[:, None, None, None].astype(x.dtype), x.shape), ()


def test_guidance_by_the_same_network_is_a_no_op():
    y = jnp.array([4, 4, 4])
    x = jnp.ones((3, 2, 2, 4))
    v = guide(shift_network, y, null=np.int32(4), scale=7.5)(x, jnp.float32(0.5), jnp.float32(0.5))
    np.testing.assert_allclose(v, shift_network(x, None, y)[0])


def test_guidance_on_the_first_channels_leaves_the_others():
    y, x, t = jnp.array([2, 5]), jnp.zeros((2, 3, 3, 4)), jnp.float32(0.5)
    v = guide(shift_network, y, null=np.int32(1), scale=3.0, channels=3)(x, t, t)
    np.testing.assert_allclose(v[0, 0, 0], [4, 4, 4, 2])  # 1 + 3 (2 - 1), the last channel unguided
    np.testing.assert_allclose(v[1, 2, 1], [13, 13, 13, 5])


@pytest.mark.parametrize("scale", [[0.0], [0.5], [3.0, 1.0, 1.0, 0.0]], ids=["0", "half", "of elements"])
def test_every_scale_but_1_moves_the_prediction(scale):
    """Also one below 1, and scales of elements some of which are 1."""
    y, x, t = jnp.array([2, 5]), jnp.zeros((2, 4)), jnp.float32(0.5)
    v = guide(lambda x, t, y: (0 * x + y[:, None], ()), y, null=np.int32(1), scale=jnp.array(scale))(x, t, t)
    np.testing.assert_allclose(v, 1 + np.array(scale) * np.array([[1.0], [4.0]]) + np.zeros((2, 4)))


def test_an_interval_may_be_a_single_time():
    assert check_interval("guidance_interval", [0.5, 0.5]) == (0.5, 0.5)


def test_the_interval_is_tested_where_the_step_began():
    seen = []
    velocity = guide(shift_network, jnp.array([2]), null=np.int32(1), scale=3.0, interval=(0.2, 0.5))
    for t, t_step in [(0.6, 0.6), (0.5, 0.5), (0.1, 0.2), (0.5, 0.6), (0.1, 0.1)]:
        seen.append(float(velocity(jnp.zeros((1, 1, 1, 1)), jnp.float32(t), jnp.float32(t_step))[0, 0, 0, 0]))
    assert seen == [2, 4, 4, 2, 2]


def test_outside_the_interval_the_unconditional_half_is_not_computed():
    calls = []

    def network(x, t, y):
        jax.debug.callback(lambda n: calls.append(int(n)), jnp.int32(len(x)))
        return x, ()

    velocity = guide(network, jnp.array([0, 1]), null=np.int32(2), scale=2.0, interval=(0.0, 0.55))
    jax.jit(lambda x: solvers.euler(velocity, x, solvers.uniform_times(4)))(jnp.ones((2, 1, 1, 1)))
    jax.effects_barrier()
    assert sorted(calls) == [2, 2, 4, 4]


def test_step_counts_that_give_no_grid_are_refused():
    with pytest.raises(ConfigError, match="steps = 0: must be at least 1"):
        solvers.uniform_times(0)
    with pytest.raises(ConfigError, match="steps = 1: must be at least 2"):
        solvers.last_step_times(1)


def exact_velocity(path):
    return gaussian_velocity(0.7, 0.4, path)


def gaussian_samples(solver, path, form, times, last="mean", count=40_000):
    """Samples of N(0.7, 0.4^2) by a stochastic solver with the exact velocity."""
    curve = paths.make(path)
    noise = noise_of((count, 1, 1, 1))
    return solver(exact_velocity(curve), noise(len(times)), times, noise, curve, solvers.diffusion(form, curve), last)


SOLVERS = [solvers.euler_maruyama, solvers.sde_heun]
EVERY = [(solver, form, path) for solver in SOLVERS for form in solvers.DIFFUSIONS for path in paths.PATHS]
QUICK = {(SOLVERS[1], "sigma", "linear")}  # euler_maruyama has quick tests below


@pytest.mark.parametrize(
    ("solver", "form", "path"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in EVERY],
)
def test_every_diffusion_keeps_the_marginal(solver, form, path):
    # to t = 1e-3 without a last step, which for forms that do not vanish with t would leave out their noise
    times = solvers.sde_times(800, paths.make(path), "velocity", form, "none", 0.04)
    x = gaussian_samples(solver, path, form, times, "none")
    assert abs(float(x.mean()) - 0.7) < 4 * 0.4 / 40_000**0.5 + 2e-3
    assert abs(float(x.std()) - 0.4) < 4 * 0.4 / 80_000**0.5 + 2e-3


def test_diffusions_are_sits():
    """SiT's forms at t = 1/4 and norm 2, where its time is 3/4; w is twice the form."""
    sine = np.sin(np.pi / 8)
    linear = {"constant": 2, "sigma": 2 / 4, "linear": 2 / 4, "increasing_decreasing": 1, "sbdm": 2 / 3}
    cosine = linear | {"sigma": 2 * sine, "sbdm": np.pi * sine / np.cos(np.pi / 8)}
    decreasing = {"decreasing": 0.25 * (2 * np.cos(np.pi * 3 / 4) + 1) ** 2}
    for path, wanted in (("linear", linear | decreasing), ("cosine", cosine | decreasing)):
        assert wanted.keys() == solvers.DIFFUSIONS.keys()
        for form, value in wanted.items():
            w = solvers.diffusion(form, paths.make(path), 2.0)(jnp.float32(0.25))
            np.testing.assert_allclose(w, 2 * value, rtol=1e-5, err_msg=f"{form}, {path}")


def test_times_of_stochastic_solvers_are_sits():
    """Five times; the ends stay away from where the form or the score is infinite."""
    vp = paths.make("vp")
    for path, form, last, first, before_last, end in [
        (LINEAR, "sigma", "mean", 1, 0.04, 0),
        (LINEAR, "sbdm", "tweedie", 1 - 1e-3, 0.04, 0),
        (vp, "sbdm", "euler", 1, 0.04, 0),  # its alpha is not 0 at t = 1
        (LINEAR, "sigma", "none", 1, None, 1e-3),
        (LINEAR, "sbdm", "none", 1 - 1e-3, None, 1e-3),
        (vp, "sigma", "none", 1, None, 1e-3),
    ]:
        times = solvers.sde_times(4, path, "velocity", form, last, 0.04)
        even = np.linspace(first, end, 5) if last == "none" else [*np.linspace(first, before_last, 4), end]
        np.testing.assert_allclose(times, even, atol=1e-12, err_msg=f"{form}, {last}")


@pytest.mark.parametrize("last", solvers.LAST_STEPS)
def test_each_last_step_by_hand(last):
    """On the cosine path from t = 1/2 to 0, for the velocity 3 x and w = 1/5; the score is (2 / pi v - x) there."""
    x, v, w, draw, half = 0.7, 2.1, 0.2, -0.4, 0.5**0.5
    noise = half * (v * 2 / np.pi + x)  # alpha = sigma = half, their derivatives -+ half pi / 2
    score = -noise / half
    drift = v - w / 2 * score
    wanted = {
        "none": x - drift / 2 + (w / 2) ** 0.5 * draw,
        "mean": x - drift / 2,
        "euler": x - v / 2,
        "tweedie": half * (x - v * 2 / np.pi),
    }[last]
    given = jnp.full((1, 1), x), np.array([0.5, 0.0]), lambda i: jnp.full((1, 1), draw), paths.make("cosine")
    found = solvers.euler_maruyama(lambda x, t, t_step: 3 * x, *given, lambda t: jnp.full_like(t, w), last)
    np.testing.assert_allclose(found, [[wanted]], rtol=1e-5)


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("form", solvers.DIFFUSIONS)
def test_diffusions_are_not_negative(path, form):
    t = jnp.linspace(1e-3, 1 - 1e-3, 50)
    w = solvers.diffusion(form, paths.make(path))(t)
    assert (w >= 0).all()
    if form != "decreasing":  # SiT's norm is inside of its square
        np.testing.assert_allclose(solvers.diffusion(form, paths.make(path), 0.5)(t), w / 2, rtol=1e-6)


def test_sbdm_on_the_vp_path_is_the_reverse_of_its_diffusion():
    """Its forward SDE is dx = -beta/2 x dt + sqrt(beta) dW (arXiv 2011.13456, Eq. 11): w = beta."""
    t = jnp.linspace(0.01, 1, 20)
    np.testing.assert_allclose(solvers.diffusion("sbdm", paths.make("vp"))(t), 0.1 + 19.9 * t, rtol=1e-5)


@pytest.mark.parametrize(
    "last", [pytest.param(last, marks=[] if last == "mean" else pytest.mark.slow) for last in solvers.LAST_STEPS]
)
def test_last_steps_end_at_the_data(last):
    times = solvers.sde_times(400, LINEAR, "velocity", "sigma", last, 0.04)
    x = gaussian_samples(solvers.euler_maruyama, "linear", "sigma", times, last)
    assert abs(float(x.mean()) - 0.7) < 4 * 0.4 / 40_000**0.5 + 2e-3
    # a step of 0.04 without noise; Tweedie's estimate lacks the variance of x given x_t
    alpha, variance = 0.96, 0.96**2 * 0.4**2 + 0.04**2
    gain, score = (0.04 - alpha * 0.4**2) / variance, 1 / variance
    factor = {
        "none": 0.4,
        "mean": variance**0.5 * (1 - 0.04 * (gain + 0.04 * score)),
        "euler": variance**0.5 * (1 - 0.04 * gain),
        "tweedie": alpha * 0.4**2 / variance**0.5,
    }[last]
    assert abs(float(x.std()) - factor) < 4 * 0.4 / 80_000**0.5 + 2e-3


def test_an_unknown_form_or_last_step_is_refused():
    with pytest.raises(ConfigError, match="diffusion = 'sigm' is unknown; did you mean 'sigma'"):
        solvers.diffusion("sigm", LINEAR)
    with pytest.raises(ConfigError, match="last_step_kind = 'men' is unknown; did you mean 'mean'"):
        solvers.euler_maruyama(
            exact_velocity(LINEAR),
            jnp.zeros((1, 1, 1, 1)),
            solvers.last_step_times(3),
            lambda i: jnp.zeros((1, 1, 1, 1)),
            last="men",
        )


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_stochastic_heun_is_of_second_order_without_noise(path):
    with jax.enable_x64(True):
        start = jnp.linspace(-2.0, 2.0, 16).reshape(1, 4, 4, 1)
        curve = paths.make(path)
        errors = []
        for n in (64, 128, 256):
            times = solvers.uniform_times(n, 1.0, 0.1)
            given = exact_velocity(curve), start, times, lambda i: jnp.zeros_like(start), curve, lambda t: 0 * t
            x = solvers.sde_heun(*given, last="none")
            spread = (curve.alpha(0.1) ** 2 * 0.4**2 + curve.sigma(0.1) ** 2) ** 0.5
            errors.append(float(jnp.abs(x - (curve.alpha(0.1) * 0.7 + spread * start)).max()))
    slopes = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(slopes, 2, atol=0.1, err_msg=f"errors {errors}")


def test_the_stochastic_heun_adds_the_noise_before_its_step():
    """One step of SiT's method for the velocity x, written out."""
    t, t_next, w, x, draw = 0.8, 0.5, 0.7, np.array([[0.3, -1.2]]), np.array([[-0.4, 0.9]])

    def drift(x, t):
        return x + w / 2 * (x + (1 - t) * x) / t  # the score is -(x + (1 - t) v) / t

    moved = x + np.sqrt(w * (t - t_next)) * draw
    d = drift(moved, t)
    wanted = moved + (t_next - t) * (d + drift(moved + (t_next - t) * d, t_next)) / 2
    given = jnp.asarray(x, jnp.float32), np.array([t, t_next]), lambda i: jnp.asarray(draw, jnp.float32)
    found = solvers.sde_heun(lambda x, t, t_step: x, *given, diffusion=lambda t: jnp.full_like(t, w), last="none")
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "heun", "euler_maruyama", "sde_heun"])
def test_all_evaluations_of_a_step_know_the_time_at_which_it_began(solver):
    times, x = np.array([1.0, 0.7, 0.5, 0.0]), jnp.zeros((1, 1))
    noise = [lambda i: x, LINEAR, lambda t: 0 * t] if solver in ("euler_maruyama", "sde_heun") else []
    found = getattr(solvers, solver)(lambda x, t, t_step: 0 * x + t_step, x, times, *noise)
    np.testing.assert_allclose(found, np.sum(np.diff(times) * times[:-1]), rtol=1e-6)


@pytest.mark.parametrize("path", [pytest.param(p, marks=[pytest.mark.slow] * (p != "linear")) for p in paths.PATHS])
def test_dopri5_keeps_its_tolerance(path):
    with jax.enable_x64(True):
        noise = jnp.linspace(-2.0, 2.0, 16).reshape(1, 4, 4, 1)
        curve = paths.make(path)
        last, first = (jnp.float64(t) for t in paths.sampling_times(curve, "velocity"))
        spread = [(curve.alpha(t) ** 2 * 0.4**2 + curve.sigma(t) ** 2) ** 0.5 for t in (first, last)]
        # the flow maps standard deviations to standard deviations
        exact = curve.alpha(last) * 0.7 + spread[1] * (noise - curve.alpha(first) * 0.7) / spread[0]
        errors = []
        for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
            x = jax.jit(
                lambda x, tol=tolerance: solvers.dopri5(
                    exact_velocity(curve), x, float(first), float(last), rtol=tol, atol=tol
                )
            )(noise)
            errors.append(float(jnp.abs(x - exact).max()))
    for tolerance, error in zip((1e-3, 1e-5, 1e-7, 1e-9), errors, strict=True):
        assert error < 20 * tolerance, f"errors {errors}"
    assert errors[3] < errors[2] < errors[1] <= errors[0], f"errors {errors}"


def test_dopri5_that_runs_out_of_steps_is_infinite():
    x = solvers.dopri5(exact_velocity(LINEAR), jnp.ones((1, 1, 1, 1)), rtol=1e-6, max_steps=2)
    assert jnp.isposinf(x).all()
    x = solvers.dopri5(lambda x, t, t_step: x + jnp.nan, jnp.ones((1, 1, 1, 1)), max_steps=2)
    assert jnp.isnan(x).all()  # more steps would not help


def strong(x, t, y):
    """A network whose prediction is 10 and its label."""
    return 10 + shift_network(x, t, y)[0], ()


def test_autoguidance_moves_away_from_the_weak_network():
    y, x, t = jnp.array([2, 5]), jnp.zeros((2, 3, 3, 4)), jnp.float32(0.5)
    v = guide(strong, y, None, weak=shift_network, scale=3.0, channels=3)(x, t, t)
    np.testing.assert_allclose(v[0, 0, 0], [32, 32, 32, 12])  # 2 + 3 (12 - 2)
    np.testing.assert_allclose(v[1, 2, 1], [35, 35, 35, 15])
    outside = guide(strong, y, None, weak=shift_network, scale=3.0, interval=(0.6, 1.0))(x, t, t)
    np.testing.assert_array_equal(outside, strong(x, t, y)[0])


def test_autoguidance_by_itself_is_a_no_op():
    y, x, t = jnp.array([2, 5]), jnp.ones((2, 3, 3, 4)), jnp.float32(0.5)
    np.testing.assert_array_equal(guide(strong, y, None, weak=strong, scale=7.5)(x, t, t), strong(x, t, y)[0])


def test_autoguidance_by_the_unconditional_network_is_classifier_free_guidance():
    y, x, t = jnp.array([2, 5]), jnp.ones((2, 3, 3, 4)), jnp.float32(0.5)

    def unconditional(x, t, y):
        return strong(x, t, jnp.full_like(y, 6))

    auto = guide(strong, y, None, weak=unconditional, scale=2.5, channels=2)(x, t, t)
    np.testing.assert_allclose(auto, guide(strong, y, np.int32(6), scale=2.5, channels=2)(x, t, t))


def test_outside_the_interval_the_weak_network_does_not_run():
    calls = []

    def weak(x, t, y):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return x, ()

    velocity = guide(strong, jnp.array([0, 1]), None, weak=weak, scale=2.0, interval=(0.0, 0.55))
    jax.jit(lambda x: solvers.euler(velocity, x, solvers.uniform_times(4)))(jnp.ones((2, 1, 1, 1)))
    jax.effects_barrier()
    assert sorted(calls) == [0.25, 0.5]


# --- Solvers by name.


def exactly(found, wanted):
    """Solve one example of four numbers by both, for the velocity (1 + t) x."""
    x = jnp.array([[0.3, -1.2, 0.8, 2.0]])
    noise = noise_of(x.shape)

    def guided(convert):
        network = convert(lambda x, t, y: ((1 + t[:, None]) * x, ()))
        return lambda x, t, t_step: network(x, jnp.full(len(x), t), None)[0]

    np.testing.assert_array_equal(found(guided, x, noise), wanted(guided(lambda network: network), x, noise))


@pytest.mark.parametrize("name", solve.FLOW)
def test_the_network_is_given_its_own_unit_of_time(name):
    """For one network in two units of time the samples are the same."""
    x = jnp.array([[0.3, -1.2, 0.8, 2.0]])
    found = []
    for time_scale in (1.0, 999.0):

        def guided(convert, time_scale=time_scale):
            network = convert(lambda x, t, y: (jnp.sin(3 * t[:, None] / time_scale) * x, ()))
            return lambda x, t, t_step: network(x, jnp.full(len(x), t), None)[0]

        solution = solve.make(name, Flow(paths.make("vp"), "noise", time_scale=time_scale), solve.Options(steps=20))
        found.append(solution(guided, x, noise_of(x.shape)))
    assert jnp.isfinite(found[0]).all()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)


@pytest.mark.parametrize("name", ["euler_maruyama", "sde_heun"])
def test_every_option_reaches_a_stochastic_solver(name):
    options = {"diffusion": "linear", "diffusion_norm": 0.3, "last_step_kind": "euler", "last_step": 0.2}
    path = paths.make("cosine")

    def wanted(velocity, x, noise):
        times, w = np.array([1.0, 0.6, 0.2, 0.0]), solvers.diffusion("linear", path, 0.3)
        return getattr(solvers, name)(velocity, x, times, noise, path, w, "euler")

    exactly(solve.make(name, Flow(path), solve.Options(steps=3, **options)), wanted)


def test_tolerances_and_steps_reach_dopri5(monkeypatch):
    import diffrax

    seen = {}

    def solved(term, solver, *, y0, stepsize_controller, max_steps, **given):
        seen.update(
            {name: getattr(stepsize_controller, name) for name in ("rtol", "atol", "dtmax")}, max_steps=max_steps
        )
        return SimpleNamespace(result=diffrax.RESULTS.successful, ys=y0[None], ts=jnp.zeros(1))

    monkeypatch.setattr(diffrax, "diffeqsolve", solved)
    exactly(solve.make("dopri5", Flow(), solve.Options(steps=7, rtol=1e-2, atol=1e-5)), lambda velocity, x, noise: x)
    assert seen == {"rtol": 1e-2, "atol": 1e-5, "dtmax": 0.25, "max_steps": 7}, "or a step over most of the interval"


def test_evaluations_are_counted():
    """A last step of Euler's, or one without noise, takes one; SiT's `none` has none."""
    counts = {"euler": 10, "euler_maruyama": 10, "heun": 19, "sde_heun": 19, "mean_flow": 10, "ddpm": 10, "ddim": 10}
    assert {name: solve.evaluations(name, 10, "mean") for name in counts} == counts
    assert solve.evaluations("sde_heun", 10, "none") == 20
    assert solve.evaluations("euler_maruyama", 10, "none") == 10
    assert solve.evaluations("dopri5", 10, "mean") is None


def test_a_network_of_spans_gets_the_fixed_one():
    network = over_span(lambda x, t, y, *, span: (span, ()), 0.25)
    np.testing.assert_array_equal(network(jnp.zeros((2, 1)), jnp.array([0.5, 1.0]), None)[0], [0.25, 0.25])
