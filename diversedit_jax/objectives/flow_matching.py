"""Flow matching: the network regresses the velocity of a path from data to noise (SiT, arXiv 2401.08740)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diversedit_jax import paths, times
from diversedit_jax.api import Batch, Forward, Network, Objective
from diversedit_jax.errors import ConfigError
from diversedit_jax.paths import Path


def regress(
    network: Network,
    path: Path,
    x: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    y: Int[Array, " b"],
) -> Forward:
    """The squared error of the predicted velocity, a mean over each example's elements, in float32."""
    x_t = paths.interpolate(path, x, noise, t)
    prediction, features = network(x_t, t, y)
    error = prediction.astype(jnp.float32) - paths.velocity(path, x, noise, t)
    return Forward(jnp.mean(error**2, axis=(1, 2, 3)), x, noise, t, x_t, y, features, metrics={})


def drop_labels(key: Array, y: Int[Array, " b"], probability: float, null: int) -> Int[Array, " b"]:
    """Each label replaced by the null label with the given probability, for classifier-free guidance."""
    return jnp.where(jax.random.bernoulli(key, probability, y.shape), null, y)


def make(
    num_classes: int,
    *,
    path: str = "linear",
    time: str = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
    label_drop: float = 0.1,
) -> Objective:
    """The objective of SiT, REPA and DiverseDiT, by default with their path, times and label drop.

    path: `linear` or `cosine`. time: `uniform` or `logit_normal` with `time_mean` and `time_std`. label_drop: the
    probability with which a label becomes the null label, `num_classes`.
    """
    if not 0 <= label_drop <= 1:
        raise ConfigError(f"label_drop must be a probability, given {label_drop}")
    curve = paths.make(path)
    draw_times = times.make(time, mean=time_mean, std=time_std)

    def objective(network: Network, batch: Batch, key: Array) -> Forward:
        key_t, key_noise, key_drop = jax.random.split(key, 3)
        x = batch["x"]
        t = draw_times(key_t, len(x))
        noise = jax.random.normal(key_noise, x.shape)
        y = drop_labels(key_drop, batch["y"], label_drop, null=num_classes)
        return regress(network, curve, x, noise, t, y)

    return objective
