"""From a trained network to images: labels in, images out, in batches of one compiled size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from diversedit_jax import paths, samplers, sharding
from diversedit_jax.api import Params, Prepare
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.guidance import guide
from diversedit_jax.models import Model
from diversedit_jax.slots import suggestion

SOLVERS = ("euler", "heun", "euler_maruyama")

# (params, frozen, labels [n], seed) -> images [n h w c] on the host: uint8, or x itself in float32 without a decoder
Sample = Callable[..., np.ndarray]


def make(
    model: Model,
    prepare: Prepare,
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
    """A function that samples and decodes, compiled at its first call; by default as the papers do without guidance.

    solver: `euler` (1 evaluation a step), `heun` (2) or `euler_maruyama` (stochastic, its last step from `last_step`).
    cfg_scale, guidance_interval, guidance_channels: see `guidance.guide`. Image i depends on the seed, on i and on its
    label alone: not on the batch size or the devices, rounding aside. Samples that are not finite are an error.
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
    def run(params: Params, frozen: Any, y: Int[Array, " b"], keys: Array, scale, interval) -> tuple[Array, Array]:
        start, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        x = jax.vmap(lambda key: jax.random.normal(key, shape))(start)
        network = model.network(params)
        velocity = guide(network, y, num_classes, scale=scale, interval=interval, channels=guidance_channels)
        if stochastic:
            x = samplers.euler_maruyama(velocity, x, times, samplers.normal_per_image(path_keys, shape), curve)
        else:
            x = getattr(samplers, solver)(velocity, x, times)
        return x if prepare.decode is None else prepare.decode(frozen, x), jnp.isfinite(x).all()

    def sample(params: Params, frozen: Any, labels: Int[np.ndarray, " n"], seed: int) -> np.ndarray:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(labels)))
        devices = jax.device_count()
        size = -(-min(batch_size, len(labels)) // devices) * devices  # a multiple of the devices
        guidance = jnp.float32(cfg_scale), (jnp.float32(low), jnp.float32(high))
        done = []
        for begin in range(0, len(labels), size):
            index = np.minimum(np.arange(begin, begin + size), len(labels) - 1)  # the last batch is filled up
            y, k = jax.device_put((jnp.asarray(labels, jnp.int32)[index], keys[index]), sharding.over_batch(mesh))
            images, finite = run(params, frozen, y, k, *guidance)
            if not finite:
                raise NonFiniteError(f"samples {begin} to {begin + size - 1} are not finite")
            done.append(np.asarray(images))
        return np.concatenate(done)[: len(labels)]

    return sample
