"""From a trained network to images: labels and one key per image in, samples out, in batches of one compiled size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from diversedit_jax import paths, samplers, sharding
from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.guidance import guide
from diversedit_jax.models import Model
from diversedit_jax.slots import suggestion

SOLVERS = ("euler", "heun", "euler_maruyama")

# (params, labels [n], seed) -> x [n h w c], on the host
Sample = Callable[..., Float[np.ndarray, "n h w c"]]


def make(
    model: Model,
    shape: tuple[int, int, int],
    num_classes: int,
    path: str,
    mesh: Mesh,
    *,
    solver: str = "euler_maruyama",
    steps: int = 250,
    cfg_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    last_step: float = 0.04,
    batch_size: int = 256,
) -> Sample:
    """A function that samples, compiled at its first call; by default the papers' protocol without guidance.

    solver: `euler` (1 evaluation a step), `heun` (2) or `euler_maruyama` (stochastic, its last step from `last_step`).
    cfg_scale, guidance_interval, guidance_channels: see `guidance.guide`. Image i depends on the seed, on i and on its
    label alone: not on the batch size or the devices, rounding aside.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"unknown solver {solver!r}; {suggestion(solver, SOLVERS)}")
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance_interval = {low}, {high}: must be two times with 0 <= lo <= hi <= 1")
    if not 0 <= cfg_scale < float("inf"):
        raise ConfigError(f"cfg_scale = {cfg_scale}: must be finite and not negative")
    if guidance_channels is not None and not 1 <= guidance_channels <= shape[-1]:
        raise ConfigError(f"guidance_channels = {guidance_channels}: the samples have {shape[-1]} channels")
    if batch_size < 1:
        raise ConfigError(f"sampling batch_size = {batch_size}: must be positive")
    curve = paths.make(path)
    stochastic = solver == "euler_maruyama"
    times = samplers.last_step_times(steps, last_step) if stochastic else samplers.uniform_times(steps)

    @partial(jax.jit, out_shardings=sharding.replicated(mesh))  # so that every process can read the result
    def run(params: Params, y: Int[Array, " b"], keys: Array, scale, interval) -> Float[Array, "b h w c"]:
        start, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        x = jax.vmap(lambda key: jax.random.normal(key, shape))(start)
        network = model.network(params)
        velocity = guide(network, y, num_classes, scale=scale, interval=interval, channels=guidance_channels)
        if stochastic:
            return samplers.euler_maruyama(velocity, x, times, samplers.normal_per_image(path_keys, shape), curve)
        return getattr(samplers, solver)(velocity, x, times)

    def sample(params: Params, labels: Int[np.ndarray, " n"], seed: int) -> Float[np.ndarray, "n h w c"]:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(labels)))
        devices = jax.device_count()
        size = -(-min(batch_size, len(labels)) // devices) * devices  # a multiple of the devices
        done = []
        for begin in range(0, len(labels), size):
            index = np.minimum(np.arange(begin, begin + size), len(labels) - 1)  # the last batch is filled up
            y, k = jax.device_put((jnp.asarray(labels, jnp.int32)[index], keys[index]), sharding.over_batch(mesh))
            done.append(np.asarray(run(params, y, k, jnp.float32(cfg_scale), (jnp.float32(low), jnp.float32(high)))))
        return np.concatenate(done)[: len(labels)]

    return sample


def to_images(decode: Callable | None, frozen: Any, x: Float[np.ndarray, "n h w c"]) -> np.ndarray:
    """uint8 images [n h w c]; where there is no decoder, the samples themselves, float32."""
    return x if decode is None else np.asarray(jax.jit(decode)(frozen, x))
