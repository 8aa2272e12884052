"""REG: flow matching of an example together with the class token of a frozen encoder (arXiv 2507.01467).

The network denoises the class token as one more token.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from diversedit_jax import conditioning
from diversedit_jax.api import Batch, Condition, Context, Forward, Network, Objective
from diversedit_jax.diffusion import paths, times
from diversedit_jax.diffusion.paths import Path, per_example
from diversedit_jax.diffusion.predictions import Flow
from diversedit_jax.errors import ConfigError
from diversedit_jax.objectives.flow_matching import bound
from diversedit_jax.registry import MANY, in_range


def regress(
    network: Network,
    path: Path,
    x: Float[Array, "b *s c"],
    noise: Float[Array, "b *s c"],
    token: Float[Array, "b k"],
    token_noise: Float[Array, "b k"],
    t: Float[Array, " b"],
    y: Condition,
    token_weight: float = 0.03,
) -> Forward:
    """The mean squared error of the velocity of x plus token_weight times that of the token.

    x and token are at the same time t of the path, each with its own noise. Metrics: `image` and `token`, both errors
    without the weight. The features have 1 + n tokens, the class token first. x, noise and x_t are without the token.
    """
    rerun = Partial(bound(run_at, path), x, noise, token, token_noise, y)
    (image, cls), features = rerun(network, t)
    if (image.shape, cls.shape) != (x.shape, token.shape):
        raise ConfigError(
            f"the network predicts {image.shape[1:]} and a token {cls.shape[1:]}, but REG needs {x.shape[1:]} and "
            f"{token.shape[1:]}"
        )

    def squared(prediction: Array, x: Array, noise: Array) -> Float[Array, " b"]:
        error = prediction.astype(jnp.float32) - paths.velocity(path, x, noise, t)
        return jnp.mean(error**2, axis=per_example(x))

    errors = {"image": squared(image, x, noise), "token": squared(cls, token, token_noise)}
    loss = errors["image"] + token_weight * errors["token"]
    metrics = {name: error.mean() for name, error in errors.items()}
    return Forward(loss, x, noise, t, paths.interpolate(path, x, noise, t), y, features, metrics, rerun)


def run_at(path: Path, x, noise, token, token_noise, y: Condition, network: Network, t: Float[Array, " b"]):
    """The output of the network at times t of the paths of x and of the token, see `Forward.rerun`."""
    c_t = paths.interpolate(path, token, token_noise, t)
    return network(paths.interpolate(path, x, noise, t), t, y, token=c_t)


def make(
    *,
    encoder: str = "dinov2",
    width: int = 768,
    token_weight: float = 0.03,
    path: str = "linear",
    time: str = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
    condition_drop: float = 0.1,
) -> Objective:
    """The objective of REG, with its defaults.

    encoder:      the batch has its class tokens, `token/<encoder>` [b width].
    width:        of the class tokens, 768 for DINOv2-B. The model is built for it.
    token_weight: weight of the error of the token.
    path, time, time_mean, time_std, condition_drop: see `objectives.flow_matching.make`.
    """
    in_range("width", width, 1, MANY)
    in_range("condition_drop", condition_drop, 0, 1)
    in_range("token_weight", token_weight, 0)
    curve, name = paths.make(path), f"token/{encoder}"
    draw_times = times.make(time, mean=time_mean, std=time_std)
    low, high = paths.training_times(curve, "velocity")

    def apply(network: Network, batch: Batch, context: Context) -> Forward:
        if name not in batch:
            raise ConfigError(
                f"objective reg needs the class tokens {name}, but the batch has {', '.join(sorted(batch))}: "
                f"configure config.encoders.{encoder}, an encoder that gives them; videos have none"
            )
        key_t, key_noise, key_token, key_drop = jax.random.split(context.key, 4)
        x, token = batch["x"], batch[name].astype(jnp.float32)
        if token.shape[1] != width:
            raise ConfigError(
                f"the class tokens {name} are {token.shape[1]} wide: set config.objective.width = {token.shape[1]}"
            )
        t = low + (high - low) * draw_times(key_t, len(x))
        noise, token_noise = jax.random.normal(key_noise, x.shape), jax.random.normal(key_token, token.shape)
        y = conditioning.drop(key_drop, batch, context, condition_drop)
        return regress(network, curve, x, noise, token, token_noise, t, y, token_weight)

    learns_null = condition_drop > 0
    return Objective(apply, Flow(curve, token=width), {"token": (width,)}, reads=(name,), learns_null=learns_null)
