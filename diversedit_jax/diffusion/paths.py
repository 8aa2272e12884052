"""Interpolants x_t = alpha(t) x + sigma(t) noise, from data at t = 0 to noise at t = 1 (SiT, arXiv 2401.08740).

A network on a path predicts the velocity dx_t/dt, the noise, the score grad log p_t(x_t), or the data. Each of them
gives the others. The official SiT runs time in the other direction; `models.official_sit` converts it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from diversedit_jax.api import Network
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import one_of

Curve = Callable[[Array], Array]  # of t
Examples = Float[Array, "b *s c"]
Times = Float[Array, " b"]


class Path(NamedTuple):
    """The coefficients of an interpolant and their derivatives in t. steep: d_sigma is infinite at t = 0."""

    alpha: Curve
    sigma: Curve
    d_alpha: Curve
    d_sigma: Curve
    steep: bool = False


PATHS = {
    "linear": Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -jnp.ones_like(t),
        d_sigma=lambda t: jnp.ones_like(t),
    ),
    # SiT's GVP: alpha^2 + sigma^2 = 1. The cosine as a sine of 1 - t is exact where the cosine vanishes.
    "cosine": Path(
        alpha=lambda t: jnp.sin((1 - t) * jnp.pi / 2),
        sigma=lambda t: jnp.sin(t * jnp.pi / 2),
        d_alpha=lambda t: -jnp.sin(t * jnp.pi / 2) * jnp.pi / 2,
        d_sigma=lambda t: jnp.sin((1 - t) * jnp.pi / 2) * jnp.pi / 2,
    ),
    # The variance-preserving diffusion of Song et al. (arXiv 2011.13456, appendix C), beta from 0.1 to 20.
    # alpha(1) is 0.0066, not 0.
    "vp": Path(
        alpha=lambda t: jnp.exp(_vp_log_alpha(t)),
        sigma=lambda t: jnp.sqrt(-jnp.expm1(2 * _vp_log_alpha(t))),
        d_alpha=lambda t: -_vp_beta(t) / 2 * jnp.exp(_vp_log_alpha(t)),
        d_sigma=lambda t: _vp_beta(t) / 2 * jnp.exp(2 * _vp_log_alpha(t)) / jnp.sqrt(-jnp.expm1(2 * _vp_log_alpha(t))),
        steep=True,
    ),
}

PREDICTIONS = ("velocity", "noise", "score", "data")


def _vp_beta(t: Array) -> Array:
    return 0.1 + t * (20 - 0.1)


def _vp_log_alpha(t: Array) -> Array:
    """-1/2 of the integral of beta."""
    return -t * (0.25 * t * (20 - 0.1) + 0.5 * 0.1)


def make(name: str) -> Path:
    """The path `name`: `linear`, `cosine` (SiT's GVP) or `vp`."""
    if name == "gvp":  # the nearest name is that of another path
        raise ConfigError(f"path = 'gvp' is unknown; SiT's GVP is 'cosine'; known: {', '.join(PATHS)}")
    return PATHS[one_of("path", name, PATHS)]


def over(t: Shaped[Array, " b"], x: Examples) -> Shaped[Array, "b ..."]:
    """One number or boolean per example, such as a time, with axes of length 1 added so that it multiplies x."""
    return t.reshape(-1, *(1,) * (x.ndim - 1))


def per_example(x: Examples) -> tuple[int, ...]:
    """The axes of x that belong to one example: all but the first."""
    return tuple(range(1, x.ndim))


def interpolate(path: Path, x: Examples, noise: Examples, t: Times) -> Examples:
    """x_t, the point at time t between data and noise."""
    t = over(t, x)
    return path.alpha(t) * x + path.sigma(t) * noise


def velocity(path: Path, x: Examples, noise: Examples, t: Times) -> Examples:
    """dx_t / dt, the target of a velocity network."""
    t = over(t, x)
    return path.d_alpha(t) * x + path.d_sigma(t) * noise


def training_times(path: Path, prediction: str) -> tuple[float, float]:
    """SiT's interval of training times: all of [0, 1], except where the regression is infinite at an end."""
    if path.steep:
        return 1e-5, 1.0
    return (0.0, 1.0) if prediction in ("velocity", "data") else (1e-3, 1 - 1e-3)


def sampling_times(path: Path, prediction: str) -> tuple[float, float]:
    """The interval of times at which SiT's samplers evaluate a network."""
    one_of("prediction", prediction, PREDICTIONS)
    if path.steep or prediction == "data":  # the velocity of a data prediction is divided by sigma
        return 1e-3, 1.0
    return training_times(path, prediction)


# Conversions between predictions at x_t (the argument x). With D = alpha sigma' - alpha' sigma > 0:
#     noise = (alpha v - alpha' x_t) / D,   data = (sigma' x_t - sigma v) / D,   score = -noise / sigma.
Values = Float[Array, "*shape"]
At = Float[Array, "*#shape"]  # a time for all, or times with the axes of `over`


def wronskian(path: Path, t: Values) -> Values:
    """D(t) = alpha sigma' - alpha' sigma: 1 for the linear path, pi / 2 for the cosine."""
    alpha, sigma, d_alpha, d_sigma = (curve(t) for curve in path[:4])
    return alpha * d_sigma - d_alpha * sigma


def data_from_velocity(path: Path, v: Values, x: Values, t: At) -> Values:
    """E[x | x_t] from the velocity: Tweedie's estimate, without its division by alpha."""
    return (path.d_sigma(t) * x - path.sigma(t) * v) / wronskian(path, t)


def noise_from_velocity(path: Path, v: Values, x: Values, t: At) -> Values:
    """E[noise | x_t] from the velocity."""
    return (path.alpha(t) * v - path.d_alpha(t) * x) / wronskian(path, t)


def velocity_from_noise(path: Path, noise: Values, x: Values, t: At) -> Values:
    """The velocity from the noise, where alpha(t) > 0."""
    return (path.d_alpha(t) * x + wronskian(path, t) * noise) / path.alpha(t)


def score_from_velocity(path: Path, v: Values, x: Values, t: At) -> Values:
    """The score from the velocity, where sigma(t) > 0 (SiT, Eq. 9, written without alpha / alpha')."""
    return -noise_from_velocity(path, v, x, t) / path.sigma(t)


def velocity_from_score(path: Path, score: Values, x: Values, t: At) -> Values:
    """The velocity from the score, where alpha(t) > 0."""
    return velocity_from_noise(path, -path.sigma(t) * score, x, t)


TO_VELOCITY = {
    "noise": velocity_from_noise,
    "score": velocity_from_score,
    "data": lambda path, data, x, t: (path.d_sigma(t) * x - wronskian(path, t) * data) / path.sigma(t),  # sigma(t) > 0
}


def as_velocity(network: Network, path: Path, prediction: str, time_scale: float = 1.0) -> Network:
    """A network of t that predicts the velocity, from one of time_scale t that predicts one of PREDICTIONS."""
    one_of("prediction", prediction, PREDICTIONS)

    def velocity_network(x, t, y):
        predicted, features = network(x, time_scale * t, y)
        if prediction == "velocity":
            return predicted, features
        return TO_VELOCITY[prediction](path, predicted.astype(x.dtype), x, over(t, x).astype(x.dtype)), features

    return velocity_network
