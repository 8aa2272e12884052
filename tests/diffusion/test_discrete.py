"""The discrete diffusion: identities of its schedule, the bound, respacing, ancestral sampling and DDIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diversedit_jax.api import Context
from diversedit_jax.diffusion import ddpm_solvers, discrete, solve
from diversedit_jax.diffusion.discrete import Gaussian
from diversedit_jax.diffusion.predictions import Diffusion
from diversedit_jax.errors import ConfigError
from diversedit_jax.objectives import ddpm
from tests.diffusion.test_solvers import noise_of

WHOLE = discrete.linear(1000)
SHAPE = (4, 3, 3, 2)
MEAN, STD = 0.7, 0.4
CONTEXT = Context(jax.random.key(0), np.int32(3))


def draws(count: int, seed: int = 0) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(count)]


def test_the_schedule_is_dits():
    np.testing.assert_allclose(WHOLE.betas[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(np.diff(WHOLE.betas), (0.02 - 1e-4) / 999, rtol=1e-9)
    np.testing.assert_allclose(np.diff(np.log(WHOLE.alphas_bar)), np.log(1 - WHOLE.betas[1:]), rtol=1e-9)
    assert WHOLE.alphas_bar[-1] < 5e-5
    few = discrete.linear(250).betas  # each step has the noise of four
    np.testing.assert_allclose(few[[0, -1]], [4e-4, 0.08], rtol=1e-12)
    np.testing.assert_allclose(np.diff(few), (0.08 - 4e-4) / 249, rtol=1e-9)


def test_the_posterior_is_bayes():
    """q(x_{i-1} | x_i, x) from the product of q(x_i | x_{i-1}) and q(x_{i-1} | x), precisions added."""
    for i in (1, 17, 500, 999):
        beta, before = WHOLE.betas[i], WHOLE.alphas_bar_prev[i]
        precision = (1 - beta) / beta + 1 / (1 - before)
        np.testing.assert_allclose(discrete.posterior_variance(WHOLE)[i], 1 / precision, rtol=1e-9)
        x, x_i = draws(2)
        mean = (np.sqrt(1 - beta) / beta * x_i + np.sqrt(before) / (1 - before) * x) / precision
        found = discrete.posterior(WHOLE, x, x_i, jnp.int32(i))
        np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.log_variance, -np.log(precision), rtol=1e-5)
    assert discrete.posterior_variance(WHOLE)[0] == 0
    logs = discrete.posterior_log_variance(WHOLE)
    assert logs[0] == logs[1] == np.log(discrete.posterior_variance(WHOLE)[1])


def test_the_learned_variance_lies_between_the_posteriors_and_beta():
    i = jnp.array([1, 10, 400, 999])
    x, noise = draws(2)
    for v, wanted in [(-1, discrete.posterior_variance(WHOLE)), (1, WHOLE.betas)]:
        output = jnp.concatenate([noise, jnp.full_like(noise, v)], axis=-1)
        found = discrete.reverse(WHOLE, output, x, i).log_variance
        np.testing.assert_allclose(found[:, 0, 0, 0], np.log(wanted[np.asarray(i)]), rtol=1e-5)


def test_without_a_learned_variance_it_is_beta():
    """But in the first step, whose own posterior variance is 0, the posterior's of the second."""
    x, noise = draws(2)
    found = discrete.reverse(WHOLE, noise, x, jnp.array([0, 1, 400, 999])).log_variance
    wanted = [discrete.posterior_variance(WHOLE)[1], *WHOLE.betas[[1, 400, 999]]]
    np.testing.assert_allclose(found.ravel(), np.log(wanted), rtol=1e-5)


def test_the_true_noise_predicts_the_posteriors_mean():
    x, noise = draws(2)
    i = jnp.array([0, 10, 400, 999])
    x_i = discrete.diffuse(WHOLE, x, noise, i)
    np.testing.assert_allclose(discrete.data_from_noise(WHOLE, noise, x_i, i), x, atol=1e-4)
    found = discrete.reverse(WHOLE, noise, x_i, i).mean
    np.testing.assert_allclose(found, discrete.posterior(WHOLE, x, x_i, i).mean, atol=1e-5)


def test_the_bound_is_a_kl_by_quadrature():
    x, noise, guess, v = draws(4)
    i = jnp.array([3, 80, 480, 977])
    x_i = discrete.diffuse(WHOLE, x, noise, i)
    output = jnp.concatenate([guess, jnp.tanh(v)], axis=-1)
    q, p = discrete.posterior(WHOLE, x, x_i, i), discrete.reverse(WHOLE, output, x_i, i)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    spread = np.exp(np.asarray(q.log_variance, np.float64) / 2)[..., None]
    z = np.asarray(q.mean, np.float64)[..., None] + spread * nodes
    log_q = stats.norm.logpdf(z, np.asarray(q.mean)[..., None], spread)
    log_p = stats.norm.logpdf(z, np.asarray(p.mean)[..., None], np.exp(np.asarray(p.log_variance) / 2)[..., None])
    kl = ((log_q - log_p) * weights).sum(-1) / weights.sum()
    found = discrete.bound(WHOLE, output, x, x_i, i)
    np.testing.assert_allclose(found, kl.mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-4)


def test_the_first_step_is_the_likelihood_of_a_bin():
    p = Gaussian(jnp.float32(0.1), jnp.float32(np.log(0.02**2)))
    levels = np.linspace(-1, 1, 256)
    found = np.exp(discrete.discretized_log_likelihood(p, jnp.asarray(levels, jnp.float32)))
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    # 2e-3: of the reference's normal distribution function by tanh
    np.testing.assert_allclose(found, np.diff(stats.norm.cdf(edges, 0.1, 0.02)), atol=2e-3 * found.max())
    np.testing.assert_allclose(found.sum(), 1, atol=1e-4)
    x, noise, guess, _ = draws(4)
    x = jnp.clip(x, -1, 1)
    i = jnp.zeros(4, jnp.int32)
    x_i = discrete.diffuse(WHOLE, x, noise, i)
    wanted = discrete.discretized_log_likelihood(discrete.reverse(WHOLE, guess, x_i, i), x)
    np.testing.assert_allclose(
        discrete.bound(WHOLE, guess, x, x_i, i), -wanted.mean(axis=(1, 2, 3)) / np.log(2), rtol=1e-6
    )


def test_the_outermost_bins_are_open():
    """A prediction near -1, 0 or 1, whose distribution reaches over both ends."""
    levels = np.linspace(-1, 1, 256)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    means = np.array([-0.97, 0.0, 0.97])[:, None]
    p = Gaussian(jnp.asarray(means, jnp.float32), jnp.float32(np.log(0.7**2)))
    found = np.exp(discrete.discretized_log_likelihood(p, jnp.asarray(levels, jnp.float32)))
    # 4e-4: of two values of the reference's normal distribution function by tanh
    np.testing.assert_allclose(found, np.diff(stats.norm.cdf(edges, means, 0.7)), atol=4e-4)
    assert (found[[0, 1, 1, 2], [0, 0, -1, -1]] > 0.05).all(), "nothing lies beyond the ends"
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-4)
    far = discrete.discretized_log_likelihood(Gaussian(jnp.float32(-0.5), jnp.float32(-12)), jnp.float32(0.5))
    np.testing.assert_allclose(far, np.log(1e-12), rtol=1e-6, err_msg="the smallest probability")


def test_the_bound_trains_the_variance_alone():
    x, noise, guess, v = draws(4)
    i = jnp.array([0, 3, 480, 977])
    x_i = discrete.diffuse(WHOLE, x, noise, i)

    def total(guess, v):
        return discrete.bound(WHOLE, jnp.concatenate([guess, v], axis=-1), x, x_i, i).sum()

    of_noise, of_variance = jax.grad(total, argnums=(0, 1))(guess, v)
    assert (of_noise == 0).all()
    assert jnp.isfinite(of_variance).all()
    assert (jnp.abs(of_variance).max(axis=(1, 2, 3)) > 0).all()


def test_respacing_is_even_from_the_first_step_to_the_last():
    found = discrete.spaced(1000, 250)
    np.testing.assert_array_equal(found, np.unique(found))
    np.testing.assert_array_equal(found, [round(k * 999 / 249) for k in range(250)])
    np.testing.assert_array_equal(found[[0, 1, 2, 124, 125, 249]], [0, 4, 8, 497, 502, 999])
    np.testing.assert_array_equal(discrete.spaced(1000, 1000), np.arange(1000))
    with pytest.raises(ConfigError, match="steps = 1001: must be at least 1 and at most 1000"):
        discrete.spaced(1000, 1001)


@pytest.mark.parametrize(("count", "place", "step"), [(21, 10, 499), (23, 11, 499), (31, 15, 500)])
def test_steps_are_spaced_by_a_running_sum(count, place, step):
    """As in ADM's `space_timesteps`. The exact place is 499.5: a product gives the other neighbour."""
    assert place * 999 / (count - 1) == 499.5
    assert round(place * (999 / (count - 1))) == 999 - step
    assert discrete.spaced(1000, count)[place] == step


def test_a_respaced_diffusion_keeps_its_marginals():
    kept = discrete.spaced(1000, 50)
    few = discrete.respace(WHOLE, kept)
    np.testing.assert_allclose(few.alphas_bar, WHOLE.alphas_bar[kept], rtol=1e-9)
    np.testing.assert_array_equal(few.timesteps, kept)
    assert (few.betas > 0).all()
    assert (few.betas < 1).all()
    same = discrete.respace(WHOLE, np.arange(1000))
    np.testing.assert_allclose(same.betas, WHOLE.betas, rtol=1e-9)


def exact(x, step, t):
    """The noise expected at a step of the whole diffusion, for data N(MEAN, STD^2)."""
    bar = jnp.asarray(WHOLE.alphas_bar, jnp.float32)[step.astype(int)]
    return jnp.sqrt(1 - bar) * (x - jnp.sqrt(bar) * MEAN) / (bar * STD**2 + 1 - bar)


SAMPLERS = {
    "ddpm": ddpm_solvers.ddpm,
    "ddim": ddpm_solvers.ddim,
    "ddim eta=1": lambda *given: ddpm_solvers.ddim(*given, eta=1.0),
}


@pytest.mark.slow  # by default the reference's numbers decide
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_a_gaussian_have_its_moments(name):
    count = 40_000
    noise = noise_of((count, 1, 1, 1))
    x = SAMPLERS[name](exact, noise(len(WHOLE.betas)), WHOLE, noise)
    assert abs(float(x.mean()) - MEAN) < 4 * STD / count**0.5 + 2e-3
    assert abs(float(x.std()) - STD) < 4 * STD / (2 * count) ** 0.5 + 3e-3


def test_ddim_converges_to_the_flow_of_the_gaussian():
    """It maps standard deviations to standard deviations; its error falls with the number of steps."""
    start = jnp.linspace(-2, 2, 16).reshape(1, 4, 4, 1)
    errors = []
    for steps in (25, 50, 100, 1000):
        few = discrete.respace(WHOLE, discrete.spaced(1000, steps))
        x = ddpm_solvers.ddim(exact, start, few, lambda i: jnp.zeros((1, 4, 4, 1)))
        errors.append(float(jnp.abs(x - (MEAN + STD * start)).max()))
    np.testing.assert_allclose(np.divide(errors[:2], errors[1:3]), 2, atol=0.2, err_msg=f"first order: {errors}")
    assert errors[3] < 5e-3


def test_ddim_with_eta_1_is_ancestral_sampling_with_the_posteriors_variance():
    few = discrete.respace(WHOLE, discrete.spaced(1000, 7))
    start, *noises = draws(8)
    noise = jnp.stack(noises)

    def lowest(x, step, t):  # v = -1: the posterior's variance
        return jnp.concatenate([exact(x, step, t), -jnp.ones_like(x)], axis=-1)

    ancestral = ddpm_solvers.ddpm(lowest, start, few, lambda i: noise[i])
    implicit = ddpm_solvers.ddim(exact, start, few, lambda i: noise[i], eta=1.0)
    np.testing.assert_allclose(implicit, ancestral, atol=2e-5)


def test_the_draws_are_counted_from_the_first_step_and_the_last_is_not_used():
    few, start = discrete.respace(WHOLE, discrete.spaced(1000, 3)), jnp.ones((1, 4))

    def sample(*sizes):
        return ddpm_solvers.ddpm(exact, start, few, lambda i: jnp.float32(sizes)[i] * jnp.ones((1, 4)))

    plain = sample(1, 2, 3)
    np.testing.assert_array_equal(sample(1, 2, 7), plain)
    for other in (sample(1, 7, 3), sample(7, 2, 3)):
        assert (other != plain).all()


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_the_guidance_interval_is_one_of_the_next_step_by_all_steps(name):
    """The last step is at 1, and the first at 1 / 1000, which an interval from 0 on includes."""
    seen = []

    def predict(x, step, t):
        jax.debug.callback(lambda *given: seen.append([float(number) for number in given]), step, t)
        return x

    few = discrete.respace(WHOLE, discrete.spaced(1000, 4))
    SAMPLERS[name](predict, jnp.zeros((1, 1)), few, lambda i: jnp.zeros((1, 1)))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(seen), [[0, 0.001], [333, 0.334], [666, 0.667], [999, 1]], rtol=1e-6)


def test_eta_reaches_ddim():
    start, few = draws(1)[0], discrete.respace(WHOLE, discrete.spaced(1000, 3))
    noise = noise_of(start.shape)

    def guided(convert):
        return lambda x, step, t: convert(lambda x, t, y: (0.1 * x, ()))(x, step, None)[0]

    found = solve.make("ddim", Diffusion(WHOLE), solve.Options(steps=3, eta=0.5))(guided, start, noise)
    wanted = ddpm_solvers.ddim(lambda x, step, t: 0.1 * x, start, few, noise, eta=0.5)
    np.testing.assert_array_equal(found, wanted)


def test_the_network_is_given_the_steps_themselves():
    seen = []

    def network(x, t, y):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return jnp.concatenate([x, x], axis=-1), ()

    batch = {"x": jnp.ones((512, 1, 1, 1)), "y": jnp.zeros(512, jnp.int32)}
    forward = ddpm.make().apply(network, batch, CONTEXT)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], forward.t)
    np.testing.assert_array_equal(forward.t, np.round(forward.t))
    assert 0 <= forward.t.min() < 20
    assert 980 < forward.t.max() <= 999
    np.testing.assert_allclose(forward.loss.mean(), forward.metrics["mse"] + forward.metrics["vb"], rtol=1e-5)


@pytest.mark.parametrize("first_step", [0, 1])
def test_a_network_that_counts_from_1_is_given_the_next_number(first_step):
    """While the noise is that of the step itself, also where a loss runs the network again."""
    batch = {"x": jnp.ones((1000, 1)), "y": jnp.zeros(1000, jnp.int32)}
    objective = ddpm.make(num_timesteps=21, betas="scaled_linear", first_step=first_step, learn_sigma=False)

    def network(x, t, y):
        return t[:, None], (x,)

    forward = objective.apply(network, batch, CONTEXT)
    assert set(forward.t.tolist()) == set(range(21))
    schedule = objective.predicts.schedule
    np.testing.assert_allclose(schedule.betas[[0, -1]], np.multiply([0.00085, 0.012], 1000 / 21), rtol=1e-9)
    bar = schedule.alphas_bar[forward.t.astype(int)][:, None]
    np.testing.assert_allclose(forward.x_t, np.sqrt(bar) + np.sqrt(1 - bar) * forward.noise, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(forward.loss, (forward.t + first_step - forward.noise[:, 0]) ** 2, rtol=1e-4)
    later = jnp.minimum(forward.t + 1, 20)
    given, (x,) = forward.rerun(network, later)
    np.testing.assert_array_equal(given[:, 0], later + first_step)
    np.testing.assert_array_equal(x, discrete.diffuse(schedule, forward.x, forward.noise, later.astype(int)))


def test_every_step_is_drawn():
    batch = {"x": jnp.ones((1000, 1)), "y": jnp.zeros(1000, jnp.int32)}
    forward = ddpm.make(num_timesteps=21, learn_sigma=False).apply(lambda x, t, y: (x, ()), batch, CONTEXT)
    assert set(forward.t.tolist()) == set(range(21))


def test_what_does_not_fit_together_is_refused():
    batch = {"x": jnp.ones((2, 4, 4, 3)), "y": jnp.zeros(2, jnp.int32)}

    def network(x, t, y):
        return x, ()

    with pytest.raises(
        ConfigError, match=r"predicts 3 channels, .*learn_sigma = True needs 6: set config.model.out_channels"
    ):
        ddpm.make().apply(network, batch, CONTEXT)
    forward = ddpm.make(learn_sigma=False).apply(network, batch, CONTEXT)
    assert forward.metrics.keys() == {"mse"}
    with pytest.raises(ConfigError, match="num_timesteps = 20: must be at least 21"):
        ddpm.make(num_timesteps=20)
    with pytest.raises(ConfigError, match="first_step = 2: must be at least 0 and at most 1"):
        ddpm.make(first_step=2)
    with pytest.raises(ConfigError, match="betas = 'scaled_linea' is unknown; did you mean 'scaled_linear'"):
        ddpm.make(betas="scaled_linea")
    with pytest.raises(ConfigError, match="steps = 1: must be at least 2"):
        solve.make("ddim", Diffusion(WHOLE), solve.Options(steps=1))
    with pytest.raises(ConfigError, match=r"eta = 1\.5: must be at least 0 and at most 1"):
        solve.make("ddim", Diffusion(WHOLE), solve.Options(eta=1.5))
