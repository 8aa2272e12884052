"""Solvers from noise (t = 1) to data (t = 0): functions over a velocity, the whole loop inside one `lax.scan`.

They follow the published samplers of REPA and DiverseDiT number by number (see `tests/test_samplers.py`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax.errors import ConfigError
from diversedit_jax.guidance import Velocity
from diversedit_jax.paths import PATHS, Path, score_from_velocity

Noise = Callable[[Array], Array]  # step index -> standard normal [b h w c]


def uniform_times(steps: int) -> np.ndarray:
    """steps + 1 equidistant times from 1 to 0."""
    if steps < 1:
        raise ConfigError(f"a sampler needs at least 1 step, given {steps}")
    return np.linspace(1.0, 0.0, steps + 1)


def last_step_times(steps: int, last: float = 0.04) -> np.ndarray:
    """`steps` equidistant times from 1 to `last`, then 0: the grid of REPA's SDE sampler."""
    if steps < 2:
        raise ConfigError(f"the stochastic sampler needs at least 2 steps, given {steps}")
    if not 0 < last < 1:
        raise ConfigError(f"the last step must begin between 0 and 1, given {last}")
    return np.append(np.linspace(1.0, last, steps), 0.0)


def euler(velocity: Velocity, x: Float[Array, "b h w c"], times: Float[np.ndarray, " s"]) -> Float[Array, "b h w c"]:
    """Euler's method along decreasing times: first order, one evaluation a step."""

    def step(x, span):
        t, t_next = span
        return x + (t_next - t) * velocity(x, t, t), None

    return jax.lax.scan(step, x, _spans(times, x))[0]


def heun(velocity: Velocity, x: Float[Array, "b h w c"], times: Float[np.ndarray, " s"]) -> Float[Array, "b h w c"]:
    """Heun's method: second order, two evaluations a step and one in the last, an Euler step (as in EDM and REPA)."""

    def step(x, span):
        t, t_next = span
        v = velocity(x, t, t)
        v_next = velocity(x + (t_next - t) * v, t_next, t)
        return x + (t_next - t) * (v + v_next) / 2, None

    x, _ = jax.lax.scan(step, x, _spans(times[:-1], x))
    return euler(velocity, x, times[-2:])


def euler_maruyama(
    velocity: Velocity,
    x: Float[Array, "b h w c"],
    times: Float[np.ndarray, " s"],
    noise: Noise,
    path: Path = PATHS["linear"],
    diffusion: Callable[[Array], Array] | None = None,
) -> Float[Array, "b h w c"]:
    """Euler-Maruyama for dx = (v - w/2 score) dt + sqrt(w) dW, whose marginals are the path's for every w(t) >= 0.

    The last step is its mean, without noise. `diffusion` is w; by default 2 sigma(t), as in REPA's code.
    `noise` gives the draw of step i.
    """
    diffusion = diffusion or (lambda t: 2 * path.sigma(t))

    def mean(x, t, t_next):
        v = velocity(x, t, t)
        return x + (t_next - t) * (v - diffusion(t) / 2 * score_from_velocity(path, v, x, t))

    def step(x, span):
        i, (t, t_next) = span
        return mean(x, t, t_next) + jnp.sqrt(diffusion(t) * (t - t_next)) * noise(i).astype(x.dtype), None

    spans = _spans(times[:-1], x)
    x, _ = jax.lax.scan(step, x, (jnp.arange(len(times) - 2), spans))
    return mean(x, *(jnp.asarray(t, x.dtype) for t in times[-2:]))


def normal_per_image(keys: Array, shape: tuple[int, ...]) -> Noise:
    """Draws of which each image's depend only on its own key, so that no image depends on the batch around it."""
    return lambda i: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)


def _spans(times: np.ndarray, x: Array) -> tuple[Array, Array]:
    times = jnp.asarray(times, x.dtype)
    return times[:-1], times[1:]
