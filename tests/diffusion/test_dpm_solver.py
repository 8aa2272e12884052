"""DPM-Solver++: exact where the data do not change, of third order on a Gaussian, guided and counted as others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diversedit_jax.diffusion import discrete, dpm_solver, paths, solve, solvers
from diversedit_jax.diffusion.predictions import AverageVelocity, Diffusion, Flow
from diversedit_jax.diffusion.solve import Options

MEAN, STD = 0.7, 0.4
VP = paths.make("vp")
START = np.linspace(-2, 2, 16).reshape(1, 4, 4, 1)
SCHEDULES = {name: make(1000) for name, make in discrete.SCHEDULES.items()}


def unguided(network):
    """A network under no guidance, as solvers take it."""

    def guided(convert):
        converted = convert(network)
        return lambda x, t, t_step: converted(x, jnp.full(len(x), t), None)[0]

    return guided


def exact_flow(path, x, first, last):
    """The flow of N(MEAN, STD^2) maps standard deviations to standard deviations."""
    (a, s), (b, r) = ((path.alpha(t), path.sigma(t)) for t in (jnp.asarray(first), jnp.asarray(last)))
    return b * MEAN + jnp.hypot(b * STD, r) * (x - a * MEAN) / jnp.hypot(a * STD, s)


def expected_noise(path):
    """The exact noise prediction."""

    def network(x, t, y):
        alpha, sigma = (paths.over(curve(t), x) for curve in (path.alpha, path.sigma))
        return sigma * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2), ()

    return network


@pytest.mark.parametrize(
    ("evaluations", "wanted"),
    [(1, [1]), (2, [2]), (3, [2, 1]), (4, [3, 1]), (5, [3, 2]), (6, [3, 2, 1]), (50, [3] * 16 + [2])],
)
def test_orders_are_those_of_so_many_evaluations(evaluations, wanted):
    assert dpm_solver.orders(evaluations) == wanted


@pytest.mark.parametrize("steps", [3, 7])
def test_it_is_exact_for_data_of_one_point(steps):
    """Then the data prediction does not change, and any number of steps of any order has no error."""
    data, last = 0.3, 1e-3

    def network(x, t, y):
        t = paths.over(t, x)
        return (x - VP.alpha(t) * data) / VP.sigma(t), ()

    with jax.enable_x64(True):
        found = solve.make("dpm_solver_pp", Flow(VP, "noise"), Options(steps=steps))(
            unguided(network), jnp.asarray(START), None
        )
        a, s = VP.alpha(jnp.float64(1)), VP.sigma(jnp.float64(1))
        wanted = VP.alpha(jnp.float64(last)) * data + VP.sigma(jnp.float64(last)) * (START - a * data) / s
        np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_step_has_the_order_that_it_says(order, monkeypatch):
    """All steps of one order, evenly spaced in lambda, for data whose expectation is a smooth function of it."""
    monkeypatch.setattr(dpm_solver, "orders", lambda evaluations: [order] * (evaluations // order))
    errors = []
    with jax.enable_x64(True):
        for count in (96, 192, 384):
            log_ratio = np.linspace(-3, 3, count + 1)
            alpha = 1 / np.sqrt(1 + np.exp(-2 * log_ratio))
            sigma = alpha * np.exp(-log_ratio)
            times = -log_ratio  # the solver only hands them on

            def predict(x, t, t_step):
                alpha = 1 / jnp.sqrt(1 + jnp.exp(2 * t))
                sigma = alpha * jnp.exp(t)
                return sigma * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)

            found = dpm_solver.dpm_solver_pp(predict, jnp.asarray(START), times, alpha, sigma)
            (a, b), (s, r) = alpha[[0, -1]], sigma[[0, -1]]
            wanted = b * MEAN + np.hypot(b * STD, r) * (START - a * MEAN) / np.hypot(a * STD, s)
            errors.append(float(jnp.abs(found - wanted).max()))
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    np.testing.assert_allclose(slopes, order, atol=0.15, err_msg=f"errors {errors}")


@pytest.mark.parametrize(
    ("path", "prediction"),
    [("vp", "noise"), ("linear", "velocity"), ("cosine", "data"), pytest.param("vp", "score", marks=pytest.mark.slow)],
)
def test_flows_of_every_path_and_prediction_converge(path, prediction):
    """To the flow of a Gaussian between the two times where the solver begins and ends."""
    curve = paths.make(path)
    first = 1.0 if path == "vp" else 0.999

    def network(x, t, y):
        noise = expected_noise(curve)(x, t / 999, y)[0]
        t = paths.over(t / 999, x)
        velocity = paths.velocity_from_noise(curve, noise, x, t)
        if prediction == "velocity":
            return velocity, ()
        return getattr(paths, f"{prediction}_from_velocity")(curve, velocity, x, t), ()

    errors = []
    with jax.enable_x64(True):
        for steps in (120, 480, 1920):
            solution = solve.make("dpm_solver_pp", Flow(curve, prediction, time_scale=999.0), Options(steps=steps))
            found = solution(unguided(network), jnp.asarray(START), None)
            errors.append(float(jnp.abs(found - exact_flow(curve, START, first, 1e-3)).max()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors
    assert errors[2] < 1e-4, errors


def expected_at_steps(schedule, first_step):
    """The exact noise prediction of a discrete diffusion at its steps and between them, and a variance beside."""
    logs = jnp.asarray(np.log(schedule.alphas_bar) / 2)

    def network(x, t, y):
        log_alpha = paths.over(jnp.interp(t - first_step, jnp.arange(1000), logs), x)
        alpha, sigma = jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))
        noise = sigma * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        return jnp.concatenate([noise, noise + 1], -1), ()

    return network


@pytest.mark.parametrize("name", SCHEDULES)
def test_discrete_diffusions_converge(name):
    """To the flow of a Gaussian from the last step to the first."""
    errors = []
    with jax.enable_x64(True):
        schedule = SCHEDULES[name]
        (a, s), (b, r) = ((np.sqrt(bar), np.sqrt(1 - bar)) for bar in schedule.alphas_bar[[-1, 0]])
        wanted = b * MEAN + np.hypot(b * STD, r) * (START - a * MEAN) / np.hypot(a * STD, s)
        for steps in (50, 200, 998):
            solution = solve.make("dpm_solver_pp", Diffusion(schedule), Options(steps=steps))
            found = solution(unguided(expected_at_steps(schedule, 0)), jnp.asarray(START), None)
            errors.append(float(jnp.abs(found - wanted).max()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors
    assert errors[2] < 1e-4, errors


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver_pp"])
def test_steps_are_counted_as_the_network_counts_them(name):
    """One network of steps from 0, the other of steps from 1: the samples are the same, and so is what it is given."""
    schedule, x = SCHEDULES["scaled_linear"], jnp.asarray(START, jnp.float32)
    samples, given = [], []
    for first_step in (0, 1):
        seen, network = [], expected_at_steps(schedule, first_step)

        def recorded(x, t, y, seen=seen, network=network):
            jax.debug.callback(lambda t: seen.append(float(t[0])), t)
            noise = network(x, t, y)[0]
            return noise.at[..., 1:].set(0), ()

        solution = solve.make(name, Diffusion(schedule._replace(first_step=first_step)), Options(steps=5))
        samples.append(solution(unguided(recorded), x, lambda i: jnp.zeros_like(x)))
        jax.effects_barrier()
        given.append(sorted(seen))
    np.testing.assert_allclose(given[1], np.add(given[0], 1), rtol=1e-5)
    np.testing.assert_allclose([len(given[0]), given[0][-1]], [5, 999], rtol=1e-6)
    np.testing.assert_allclose(samples[1], samples[0], atol=1e-4)


def test_between_two_steps_log_alpha_is_linear():
    schedule = SCHEDULES["linear"]
    alpha, sigma = discrete.at_times(schedule, np.array([0.001, 0.5, 0.50025, 0.501, 1.0]))
    logs = np.log(schedule.alphas_bar) / 2
    wanted = [logs[0], logs[499], 0.75 * logs[499] + 0.25 * logs[500], logs[500], logs[999]]
    np.testing.assert_allclose(np.log(alpha), wanted, rtol=1e-9)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)


def test_the_interval_of_guidance_is_tested_where_a_step_begins():
    times, seen = solvers.uniform_times(5, 1.0, 0.5), []

    def predict(x, t, t_step):
        jax.debug.callback(lambda *given: seen.append([float(number) for number in given]), t, t_step)
        return x

    dpm_solver.dpm_solver_pp(predict, jnp.ones((1, 1)), times, np.linspace(0.1, 0.9, 6), np.linspace(0.9, 0.1, 6))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen), [[0.6, 0.7], [0.7, 0.7], [0.8, 1], [0.9, 1], [1, 1]], rtol=1e-6)


def test_the_network_of_an_average_velocity_is_solved():
    x = jnp.asarray(START, jnp.float32)

    def network(x, t, y, *, span):
        t = paths.over(t, x)
        return x * (2 * t - 1) / ((1 - t) ** 2 + t**2), ()  # the velocity for data N(0, 1)

    found = solve.make("dpm_solver_pp", AverageVelocity(), Options(steps=60))(unguided(network), x, None)
    np.testing.assert_allclose(found, x, atol=1e-2)
    assert solve.evaluations("dpm_solver_pp", 50, "mean") == 50
