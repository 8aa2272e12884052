"""Flow matching: the network regresses the velocity of a path from data to noise (SiT, arXiv 2401.08740, section 2).

It may also regress the noise, the score or the data, which determine the velocity.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from diversedit_jax import conditioning
from diversedit_jax.api import Batch, Condition, Context, Forward, Network, Objective
from diversedit_jax.diffusion import paths, times
from diversedit_jax.diffusion.paths import Path, over, per_example
from diversedit_jax.diffusion.predictions import Flow
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of


def data_error(path: Path, prediction: Array, x: Array, noise: Array, t: Float[Array, " b"]) -> Array:
    """The predicted data minus the data."""
    return prediction - x


bound = cache(partial)  # the same function at every call: two `Forward.rerun` then have one tree structure

ERRORS = {
    "velocity": lambda path, prediction, x, noise, t: prediction - paths.velocity(path, x, noise, t),
    "noise": lambda path, prediction, x, noise, t: prediction - noise,
    # The error of the score in units of the noise, sigma score + noise, is finite at every t.
    "score": lambda path, prediction, x, noise, t: over(path.sigma(t), x) * prediction + noise,
    "data": data_error,
}

# Weights of a noise or score error. `velocity` makes it the error of the velocity. `likelihood` makes it a bound on the
# negative log-likelihood of the diffusion (Song et al., arXiv 2101.09258), up to a constant.
WEIGHTS = {
    "none": lambda path, t: jnp.ones_like(t),
    "velocity": lambda path, t: (paths.wronskian(path, t) / path.alpha(t)) ** 2,
    "likelihood": lambda path, t: paths.wronskian(path, t) / (path.alpha(t) * path.sigma(t)),
}


def regress(
    network: Network,
    path: Path,
    x: Float[Array, "b *s c"],
    noise: Float[Array, "b *s c"],
    t: Float[Array, " b"],
    y: Condition,
    error: Callable[..., Array] = ERRORS["velocity"],
    weight: Callable[[Path, Array], Array] = WEIGHTS["none"],
    time_scale: float = 1.0,
) -> Forward:
    """The weighted squared error of the prediction, a mean over the elements of each example, in float32.

    t: in [0, 1]. The network is given time_scale t.
    """
    rerun = Partial(bound(run_at, path, time_scale=time_scale), x, noise, y)
    prediction, features = rerun(network, t)
    if prediction.shape != x.shape:
        raise ConfigError(f"the network predicts {prediction.shape[1:]}, but flow matching needs {x.shape[1:]}")
    squared = jnp.mean(error(path, prediction.astype(jnp.float32), x, noise, t) ** 2, axis=per_example(x))
    x_t = paths.interpolate(path, x, noise, t)
    return Forward(weight(path, t) * squared, x, noise, t, x_t, y, features, metrics={}, rerun=rerun)


def run_at(
    path: Path,
    x: Array,
    noise: Array,
    y: Condition,
    network: Network,
    t: Float[Array, " b"],
    *,
    time_scale: float = 1.0,
):
    """The output of the network at times t of the path between x and noise, see `Forward.rerun`."""
    return network(paths.interpolate(path, x, noise, t), time_scale * t, y)


def make(
    *,
    path: str = "linear",
    prediction: str = "velocity",
    weight: str = "none",
    time: str = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
    time_scale: float = 1.0,
    condition_drop: float = 0.1,
) -> Objective:
    """The objective of SiT, REPA and DiverseDiT, by default with their path, times and dropout.

    U-ViT in continuous time (arXiv 2209.12152) has path = "vp", prediction = "noise" and time_scale = 999.

    path:       `linear`, `cosine` (SiT's GVP) or `vp`.
    prediction: `velocity`, `noise`, `score` or `data`. `paths.training_times` gives its interval of times.
    weight:     of a noise or score error: `none`, `velocity` or `likelihood`.
    time:       `uniform`, or `logit_normal`: the sigmoid of a normal number.
    time_mean, time_std: of that number.
    time_scale: the network is given time_scale t.
    condition_drop: the probability that a condition becomes the null condition, for classifier-free guidance.
    """
    in_range("condition_drop", condition_drop, 0, 1)
    curve = paths.make(path)
    one_of("prediction", prediction, paths.PREDICTIONS)
    one_of("weight", weight, WEIGHTS)
    if prediction in ("velocity", "data") and weight != "none":
        raise ConfigError(
            f"weight = {weight!r} is for noise and score errors; prediction = {prediction!r} needs 'none'"
        )
    in_range("time_scale", time_scale, above=0)
    draw_times = times.make(time, mean=time_mean, std=time_std)
    low, high = paths.training_times(curve, prediction)

    def apply(network: Network, batch: Batch, context: Context) -> Forward:
        key_t, key_noise, key_drop = jax.random.split(context.key, 3)
        x = batch["x"]
        t = low + (high - low) * draw_times(key_t, len(x))
        noise = jax.random.normal(key_noise, x.shape)
        y = conditioning.drop(key_drop, batch, context, condition_drop)
        return regress(network, curve, x, noise, t, y, ERRORS[prediction], WEIGHTS[weight], time_scale)

    return Objective(apply, Flow(curve, prediction, time_scale=time_scale), learns_null=condition_drop > 0)
