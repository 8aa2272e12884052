"""Samplers of the discrete diffusion, equal to DiT's: DDPM's (arXiv 2006.11239) and DDIM's (arXiv 2010.02502).

Each runs from the last step to the first in one `lax.scan`. `predict` is a network under `guidance.guide`:
(x, step, t) -> noise, or noise and variance. The step is that of training, as a float, counted from
`Schedule.first_step`. t in (0, 1] is its place in a guidance interval. `noise` gives the draw of each step, counted
from the first one taken.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diversedit_jax.diffusion import discrete
from diversedit_jax.diffusion.discrete import Schedule, at
from diversedit_jax.diffusion.guidance import Velocity
from diversedit_jax.diffusion.paths import Examples
from diversedit_jax.diffusion.solvers import Noise


def ddpm(predict: Velocity, x: Examples, schedule: Schedule, noise: Noise) -> Examples:
    """Ancestral sampling (DDPM, Algorithm 2) with the variance that the network predicts, else beta.

    The last step adds no noise. `schedule` may be respaced.
    """

    def step(x, i, output, draw):
        p = discrete.reverse(schedule, output, x, i)
        return p.mean + jnp.where(i > 0, jnp.exp(p.log_variance / 2), 0) * draw

    return _loop(step, predict, x, schedule, noise)


def ddim(predict: Velocity, x: Examples, schedule: Schedule, noise: Noise, eta: float = 0.0) -> Examples:
    """DDIM (Eq. 12). eta = 0 is deterministic, eta = 1 has the posterior's variance. A learned variance is not used."""
    before = schedule.alphas_bar_prev
    sigma = eta * np.sqrt(discrete.posterior_variance(schedule))  # Eq. 16; 0 in the first step
    direction = np.sqrt(1 - before - sigma**2)

    def step(x, i, output, draw):
        predicted, _ = discrete.split(output, x.shape[-1])
        data = discrete.data_from_noise(schedule, predicted, x, i)
        return at(np.sqrt(before), i, x) * data + at(direction, i, x) * predicted + at(sigma, i, x) * draw

    return _loop(step, predict, x, schedule, noise)


def _loop(step: Callable, predict: Velocity, x: Examples, schedule: Schedule, noise: Noise) -> Examples:
    """`step` (x, i, output, draw) -> x for i from the last step of the schedule to 0."""
    count = len(schedule.timesteps)

    def body(x, at_step):
        taken, i, timestep = at_step
        output = predict(x, timestep + schedule.first_step, (timestep + 1) / schedule.num_timesteps)
        return step(x, i, output, noise(taken).astype(x.dtype)).astype(x.dtype), None

    order = jnp.arange(count - 1, -1, -1)
    timesteps = jnp.asarray(schedule.timesteps, x.dtype)[order]
    return jax.lax.scan(body, x, (jnp.arange(count), order, timesteps))[0]
