"""Flow matching: the network regresses the velocity of a path from data to noise, or the noise or score that determine
it (SiT, arXiv 2401.08740, section 2)."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from diversedit_jax.api import Batch, Forward, Network, Objective
from diversedit_jax.diffusion import paths, times
from diversedit_jax.diffusion.paths import Path
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion


def velocity_error(path: Path, prediction: Array, x: Array, noise: Array, t: Float[Array, " b"]) -> Array:
    """v - dx_t/dt."""
    return prediction - paths.velocity(path, x, noise, t)


def noise_error(path: Path, prediction: Array, x: Array, noise: Array, t: Float[Array, " b"]) -> Array:
    """The predicted noise less the noise."""
    return prediction - noise


def score_error(path: Path, prediction: Array, x: Array, noise: Array, t: Float[Array, " b"]) -> Array:
    """sigma score + noise: the score's error in units of the noise, finite at every t."""
    return paths.over_image(path.sigma(t)) * prediction + noise


ERRORS = {"velocity": velocity_error, "noise": noise_error, "score": score_error}

# Weights of a noise or score error. `velocity` makes it the error of the velocity, `likelihood` a bound on the negative
# log-likelihood of the diffusion (Song et al., arXiv 2101.09258), up to its constant.
WEIGHTS = {
    "none": lambda path, t: jnp.ones_like(t),
    "velocity": lambda path, t: (paths.wronskian(path, t) / path.alpha(t)) ** 2,
    "likelihood": lambda path, t: paths.wronskian(path, t) / (path.alpha(t) * path.sigma(t)),
}


def regress(
    network: Network,
    path: Path,
    x: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    y: Int[Array, " b"],
    error: Callable[..., Array] = velocity_error,
    weight: Callable[[Path, Array], Array] = WEIGHTS["none"],
) -> Forward:
    """The squared error of the prediction, weighted, a mean over each example's elements, in float32."""
    rerun = Partial(along(path), x, noise, y)
    prediction, features = rerun(network, t)
    if prediction.shape != x.shape:
        raise ConfigError(f"the network predicts {prediction.shape[1:]}, flow matching needs {x.shape[1:]}")
    squared = jnp.mean(error(path, prediction.astype(jnp.float32), x, noise, t) ** 2, axis=(1, 2, 3))
    x_t = paths.interpolate(path, x, noise, t)
    return Forward(weight(path, t) * squared, x, noise, t, x_t, y, features, metrics={}, rerun=rerun)


@cache
def along(path: Path) -> Callable[..., tuple[Array, Sequence[Array]]]:
    """`run_at` on a path; the same function at every call, so that two `Forward.rerun` are of one structure."""
    return partial(run_at, path)


def run_at(path: Path, x: Array, noise: Array, y: Array, network: Network, t: Float[Array, " b"]):
    """The network's output at times t of the path between x and noise (see `Forward.rerun`)."""
    return network(paths.interpolate(path, x, noise, t), t, y)


def drop_labels(key: Array, y: Int[Array, " b"], probability: float, null: int) -> Int[Array, " b"]:
    """Each label replaced by the null label with the given probability, for classifier-free guidance."""
    return jnp.where(jax.random.bernoulli(key, probability, y.shape), null, y)


def make(
    num_classes: int,
    *,
    path: str = "linear",
    prediction: str = "velocity",
    weight: str = "none",
    time: str = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
    label_drop: float = 0.1,
) -> Objective:
    """The objective of SiT, REPA and DiverseDiT, by default with their path, times and label drop.

    path: `linear`, `cosine` (SiT's GVP) or `vp`. prediction: `velocity`, `noise` or `score`, with the training times
    cut off as `paths.training_times` has it. weight: of a noise or score error, `none`, `velocity` or `likelihood`.
    time: `uniform` or `logit_normal` with `time_mean` and `time_std`. label_drop: the probability with which a label
    becomes the null label, `num_classes`.
    """
    if not 0 <= label_drop <= 1:
        raise ConfigError(f"label_drop must be a probability, given {label_drop}")
    curve = paths.make(path)
    paths.check_prediction(prediction)
    if weight not in WEIGHTS:
        raise ConfigError(f"unknown weight {weight!r}; {suggestion(weight, WEIGHTS)}")
    if prediction == "velocity" and weight != "none":
        raise ConfigError(f"weight = {weight!r} is of noise and score errors; prediction = 'velocity' needs 'none'")
    draw_times = times.make(time, mean=time_mean, std=time_std)
    low, high = paths.training_times(path, prediction)

    def objective(network: Network, batch: Batch, key: Array) -> Forward:
        key_t, key_noise, key_drop = jax.random.split(key, 3)
        x = batch["x"]
        t = low + (high - low) * draw_times(key_t, len(x))
        noise = jax.random.normal(key_noise, x.shape)
        y = drop_labels(key_drop, batch["y"], label_drop, null=num_classes)
        return regress(network, curve, x, noise, t, y, ERRORS[prediction], WEIGHTS[weight])

    return objective
