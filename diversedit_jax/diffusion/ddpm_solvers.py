"""Samplers of the discrete diffusion, from its last step to its first in one `lax.scan`: DDPM's and DDIM's (arXiv
2006.11239, 2010.02502), equal to those of DiT.

`predict` is a network under `guidance.guide`: (x, step, t) -> noise, or noise and variance; the step is that of the
trained diffusion, as a float, and t in (0, 1] its place on the time axis of guidance intervals.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax.diffusion import discrete
from diversedit_jax.diffusion.discrete import Schedule, at
from diversedit_jax.diffusion.guidance import Velocity
from diversedit_jax.diffusion.solvers import Noise
from diversedit_jax.registry import in_range


def ddpm(predict: Velocity, x: Float[Array, "b *s c"], schedule: Schedule, noise: Noise) -> Float[Array, "b *s c"]:
    """Ancestral sampling (DDPM, Algorithm 2), with the variance that the network predicts, or beta; no noise at last.

    `schedule` may be respaced. `noise` gives the draw of each step, counted from the first one taken.
    """

    def step(x, i, output, draw):
        p = discrete.reverse(schedule, output, x, i)
        return p.mean + jnp.where(i > 0, jnp.exp(p.log_variance / 2), 0) * draw

    return _loop(step, predict, x, schedule, noise)


def ddim(
    predict: Velocity, x: Float[Array, "b *s c"], schedule: Schedule, noise: Noise, eta: float = 0.0
) -> Float[Array, "b *s c"]:
    """DDIM (Eq. 12): deterministic for eta = 0, of the posterior's variance for eta = 1; a learned one is not used."""
    in_range("eta", eta, 0, 1)
    before = schedule.alphas_bar_prev
    sigma = eta * np.sqrt(discrete.posterior_variance(schedule))  # Eq. 16; 0 in the first step
    direction = np.sqrt(1 - before - sigma**2)

    def step(x, i, output, draw):
        predicted, _ = discrete.split(output, x.shape[-1])
        data = discrete.data_from_noise(schedule, predicted, x, i)
        return at(np.sqrt(before), i, x) * data + at(direction, i, x) * predicted + at(sigma, i, x) * draw

    return _loop(step, predict, x, schedule, noise)


def _loop(
    step: Callable, predict: Velocity, x: Float[Array, "b *s c"], schedule: Schedule, noise: Noise
) -> Float[Array, "b *s c"]:
    """`step` (x, i, output, draw) -> x for i from the last step of the schedule to 0."""
    count = in_range("steps", len(schedule.timesteps), 2)

    def body(x, at_step):
        taken, i, timestep = at_step
        output = predict(x, timestep, (timestep + 1) / schedule.num_timesteps)
        return step(x, i, output, noise(taken).astype(x.dtype)).astype(x.dtype), None

    order = jnp.arange(count - 1, -1, -1)
    timesteps = jnp.asarray(schedule.timesteps, x.dtype)[order]
    return jax.lax.scan(body, x, (jnp.arange(count), order, timesteps))[0]
