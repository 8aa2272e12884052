"""REG: flow matching of an image together with the class token of a frozen encoder, which the network denoises as one
more token (arXiv 2507.01467).
"""

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
from diversedit_jax.objectives.flow_matching import drop_labels, velocity_error


def regress(
    network: Network,
    path: Path,
    x: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    token: Float[Array, "b k"],
    token_noise: Float[Array, "b k"],
    t: Float[Array, " b"],
    y: Int[Array, " b"],
    token_weight: float = 0.03,
) -> Forward:
    """The squared error of the image's velocity, a mean over its elements, + token_weight x that of the token's.

    Image and token are at the same time t of the path, under noises of their own. Metrics: `image` and `token`, the two
    errors without the weight. In the result, features have 1 + n tokens, the class token's first; x, noise and x_t are
    the image's.
    """
    rerun = Partial(along(path), x, noise, token, token_noise, y)
    (image, cls), features = rerun(network, t)
    if (image.shape, cls.shape) != (x.shape, token.shape):
        raise ConfigError(
            f"the network predicts {image.shape[1:]} and a token {cls.shape[1:]}, REG needs {x.shape[1:]} and "
            f"{token.shape[1:]}"
        )

    def squared(prediction: Array, x: Array, noise: Array) -> Float[Array, " b"]:
        error = velocity_error(path, prediction.astype(jnp.float32), x, noise, t)
        return jnp.mean(error**2, axis=(1, 2, 3))

    errors = {"image": squared(image, x, noise), "token": squared(*map(_as_image, (cls, token, token_noise)))}
    loss = errors["image"] + token_weight * errors["token"]
    metrics = {name: error.mean() for name, error in errors.items()}
    return Forward(loss, x, noise, t, paths.interpolate(path, x, noise, t), y, features, metrics, rerun)


@cache
def along(path: Path) -> Callable[..., tuple[tuple[Array, Array], Sequence[Array]]]:
    """`run_at` on a path; the same function at every call, so that two `Forward.rerun` are of one structure."""
    return partial(run_at, path)


def run_at(
    path: Path,
    x: Array,
    noise: Array,
    token: Array,
    token_noise: Array,
    y: Array,
    network: Network,
    t: Float[Array, " b"],
):
    """The network's output where image and token are at times t of the path to their noises (see `Forward.rerun`)."""
    c_t = paths.interpolate(path, _as_image(token), _as_image(token_noise), t)[:, 0, 0]
    return network(paths.interpolate(path, x, noise, t), t, y, token=c_t)


def _as_image(token: Float[Array, "b k"]) -> Float[Array, "b 1 1 k"]:
    return token[:, None, None]


def make(
    num_classes: int,
    *,
    encoder: str = "dinov2",
    token_weight: float = 0.03,
    path: str = "linear",
    time: str = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
    label_drop: float = 0.1,
) -> Objective:
    """The objective of REG, with its defaults; the network is one with `model.token_width`.

    encoder: the class tokens are batch[`token/<encoder>`] [b k]. token_weight: of the token's error beside the image's.
    path, time, time_mean, time_std, label_drop: as those of `flow_matching`.
    """
    if not 0 <= label_drop <= 1:
        raise ConfigError(f"label_drop must be a probability, given {label_drop}")
    if not 0 <= token_weight < float("inf"):
        raise ConfigError(f"token_weight = {token_weight}: must be finite and not negative")
    curve = paths.make(path)
    draw_times = times.make(time, mean=time_mean, std=time_std)
    low, high = paths.training_times(path, "velocity")

    def objective(network: Network, batch: Batch, key: Array) -> Forward:
        if f"token/{encoder}" not in batch:
            raise ConfigError(
                f"objective reg needs the class tokens token/{encoder}, the batch has {', '.join(sorted(batch))}: "
                f"configure config.encoders.{encoder}"
            )
        key_t, key_noise, key_token, key_drop = jax.random.split(key, 4)
        x, token = batch["x"], batch[f"token/{encoder}"].astype(jnp.float32)
        t = low + (high - low) * draw_times(key_t, len(x))
        noise, token_noise = jax.random.normal(key_noise, x.shape), jax.random.normal(key_token, token.shape)
        y = drop_labels(key_drop, batch["y"], label_drop, null=num_classes)
        return regress(network, curve, x, noise, token, token_noise, t, y, token_weight)

    return objective
