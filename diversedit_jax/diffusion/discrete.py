"""The discrete diffusion of DDPM: its noise schedule, posterior and respacing (arXiv 2006.11239, 2102.09672).

x_i = sqrt(alpha_bar_i) x + sqrt(1 - alpha_bar_i) noise. Step i = 0 is the least noisy, as t = 0 is data on paths.
Coefficients are float64 numpy arrays. They are rounded to float32 where they multiply an example.
"""

from itertools import accumulate, repeat
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diversedit_jax.diffusion.paths import Examples, over, per_example
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import MANY, in_range

Index = Int[Array, ""] | Int[Array, " b"]  # one step for all examples, or one for each
Output = Float[Array, "b *s k"]  # of a network: k = c (noise) or 2 c (noise and variance)


class Schedule(NamedTuple):
    """A diffusion of n steps: all steps of the diffusion that a network was trained with, or some of them.

    num_timesteps:   the number of steps in training.
    timesteps:       [n], increasing: the number of each step in training, from 0.
    betas:           [n].
    alphas_bar:      [n], the cumulative products of 1 - beta.
    alphas_bar_prev: [n], alphas_bar of the step before; 1 for the first.
    first_step:      the network is given the number of a step plus this: 1 where its code counts from 1.
    """

    num_timesteps: int
    timesteps: np.ndarray
    betas: np.ndarray
    alphas_bar: np.ndarray
    alphas_bar_prev: np.ndarray
    first_step: int = 0


class Gaussian(NamedTuple):
    """Independent normal distributions for the elements of an example."""

    mean: Array
    log_variance: Array


def from_betas(betas: np.ndarray, num_timesteps: int, timesteps: np.ndarray) -> Schedule:
    """The schedule with these betas."""
    alphas_bar = np.cumprod(1 - betas)
    return Schedule(num_timesteps, timesteps, betas, alphas_bar, np.append(1.0, alphas_bar[:-1]))


def linear(num_timesteps: int) -> Schedule:
    """DDPM's schedule: beta from 1e-4 to 0.02 in 1000 steps, or in other numbers scaled to the same total noise."""
    in_range("num_timesteps", num_timesteps, 21, MANY)  # with fewer, the last beta is 1 or more
    scale = 1000 / num_timesteps
    betas = np.linspace(scale * 1e-4, scale * 0.02, num_timesteps)
    return from_betas(betas, num_timesteps, np.arange(num_timesteps))


def scaled_linear(num_timesteps: int) -> Schedule:
    """The schedule of latent diffusion (arXiv 2112.10752): the root of beta is linear, beta from 0.00085 to 0.012.

    That is in 1000 steps. Other numbers of steps are scaled to the same total noise.
    """
    in_range("num_timesteps", num_timesteps, 21, MANY)
    betas = 1000 / num_timesteps * np.linspace(0.00085**0.5, 0.012**0.5, num_timesteps) ** 2
    return from_betas(betas, num_timesteps, np.arange(num_timesteps))


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear}


def spaced(num_timesteps: int, count: int) -> np.ndarray:
    """`count` of the steps, evenly spaced from the first to the last (arXiv 2102.09672).

    250 of 1000 are 0, 4, 8, 12, 16, 20, ..., 999.
    """
    in_range("steps", count, 1, num_timesteps)
    stride = (num_timesteps - 1) / (count - 1) if count > 1 else 1
    places = accumulate(repeat(stride, count - 1), initial=0.0)  # a running sum: the reference rounds it so
    return np.array([round(place) for place in places])


def respace(schedule: Schedule, timesteps: np.ndarray) -> Schedule:
    """The diffusion that visits only some steps of `schedule`, with the same marginals there."""
    alphas_bar = schedule.alphas_bar[timesteps]
    betas = 1 - alphas_bar / np.append(1.0, alphas_bar[:-1])
    kept = from_betas(betas, schedule.num_timesteps, schedule.timesteps[timesteps])
    return kept._replace(first_step=schedule.first_step)


def at_times(schedule: Schedule, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) at times of [1 / n, 1], where the n steps of the schedule are at 1 / n, 2 / n, ... 1.

    log alpha is linear between two steps, as DPM-Solver has it (arXiv 2206.00927, appendix D).
    """
    n = len(schedule.alphas_bar)
    log_alpha = np.interp(t, np.arange(1, n + 1) / n, np.log(schedule.alphas_bar) / 2)
    return np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))


def posterior_variance(schedule: Schedule) -> np.ndarray:
    """The variance of q(x_{i-1} | x_i, x) (DDPM, Eq. 7); 0 for the first step."""
    return schedule.betas * (1 - schedule.alphas_bar_prev) / (1 - schedule.alphas_bar)


def posterior_log_variance(schedule: Schedule) -> np.ndarray:
    """The logarithm of `posterior_variance`. The first step, else -inf, takes the value of the second."""
    variance = posterior_variance(schedule)
    return np.log(np.append(variance[1], variance[1:]))


def at(values: np.ndarray, i: Index, x: Array) -> Array:
    """The coefficients of steps i, with the axes to multiply x."""
    found = jnp.asarray(values, jnp.float32)[i]
    return over(found, x) if found.ndim else found


def diffuse(schedule: Schedule, x: Examples, noise: Examples, i: Index) -> Examples:
    """x_i, a draw of q(x_i | x) (DDPM, Eq. 4)."""
    return at(np.sqrt(schedule.alphas_bar), i, x) * x + at(np.sqrt(1 - schedule.alphas_bar), i, x) * noise


def data_from_noise(schedule: Schedule, noise: Examples, x_i: Examples, i: Index) -> Examples:
    """x from x_i and its noise."""
    of_x, of_noise = np.sqrt(1 / schedule.alphas_bar), np.sqrt(1 / schedule.alphas_bar - 1)
    return at(of_x, i, x_i) * x_i - at(of_noise, i, x_i) * noise


def posterior(schedule: Schedule, x: Examples, x_i: Examples, i: Index) -> Gaussian:
    """q(x_{i-1} | x_i, x) (DDPM, Eq. 6)."""
    betas, alphas_bar, before = schedule.betas, schedule.alphas_bar, schedule.alphas_bar_prev
    of_x = betas * np.sqrt(before) / (1 - alphas_bar)
    of_x_i = (1 - before) * np.sqrt(1 - betas) / (1 - alphas_bar)
    return Gaussian(at(of_x, i, x) * x + at(of_x_i, i, x) * x_i, at(posterior_log_variance(schedule), i, x))


def split(output: Output, channels: int) -> tuple[Examples, Array | None]:
    """A network's output as (noise, v). v gives the variance, see `reverse`; None if the output is the noise alone."""
    if output.shape[-1] not in (channels, 2 * channels):
        raise ConfigError(
            f"the network predicts {output.shape[-1]} channels, wanted {channels} (noise) or {2 * channels} "
            "(noise and variance): set config.model.out_channels"
        )
    return output[..., :channels], output[..., channels:] if output.shape[-1] > channels else None


def reverse(schedule: Schedule, output: Output, x_i: Examples, i: Index) -> Gaussian:
    """p(x_{i-1} | x_i) by a network's output.

    A learned variance lies between the posterior's (v = -1) and beta (v = 1), in logarithms (arXiv 2102.09672, Eq. 15).
    """
    noise, v = split(output, x_i.shape[-1])
    mean = posterior(schedule, data_from_noise(schedule, noise, x_i, i), x_i, i).mean
    if v is None:
        # beta, but in the first step the posterior variance of the second: its own is 0
        fixed = np.append(posterior_variance(schedule)[1], schedule.betas[1:])
        return Gaussian(mean, at(np.log(fixed), i, x_i))
    low, high = (at(v, i, x_i) for v in (posterior_log_variance(schedule), np.log(schedule.betas)))
    fraction = (v + 1) / 2
    return Gaussian(mean, fraction * high + (1 - fraction) * low)


def kl(p: Gaussian, q: Gaussian) -> Array:
    """KL(p || q) of each element, in nats."""
    spread = jnp.exp(p.log_variance - q.log_variance) + (p.mean - q.mean) ** 2 * jnp.exp(-q.log_variance)
    return 0.5 * (q.log_variance - p.log_variance + spread - 1)


def discretized_log_likelihood(p: Gaussian, x: Array) -> Array:
    """log p of the bin of width 2/255 around each element; the outermost bins are open (DDPM, Eq. 13). x in [-1, 1]."""
    inverse = jnp.exp(-p.log_variance / 2)
    upper = _normal_cdf(inverse * (x - p.mean + 1 / 255))
    lower = _normal_cdf(inverse * (x - p.mean - 1 / 255))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(x: Array) -> Array:
    """The approximation by tanh that the codes of DDPM and DiT use."""
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def bound(schedule: Schedule, output: Output, x: Examples, x_i: Examples, i: Int[Array, " b"]) -> Float[Array, " b"]:
    """The term of the variational bound at step i, in bits per element (DDPM, Eq. 5).

    Its gradient trains the variance and not the predicted noise (arXiv 2102.09672, section 3.1).
    """
    noise, v = split(output, x.shape[-1])
    noise = jax.lax.stop_gradient(noise)
    p = reverse(schedule, noise if v is None else jnp.concatenate([noise, v], axis=-1), x_i, i)
    later = kl(posterior(schedule, x, x_i, i), p)
    first = -discretized_log_likelihood(p, x)
    return jnp.where(i == 0, first.mean(axis=per_example(x)), later.mean(axis=per_example(x))) / np.log(2)
