"""Interpolants x_t = alpha(t) x + sigma(t) noise, from data at t = 0 to noise at t = 1 (SiT, arXiv 2401.08740).

The official SiT runs time the other way; `interop` converts at the border.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from diversedit_jax.errors import ConfigError
from diversedit_jax.slots import suggestion

Curve = Callable[[Array], Array]


class Path(NamedTuple):
    """The coefficients of an interpolant and their derivatives in t."""

    alpha: Curve
    sigma: Curve
    d_alpha: Curve
    d_sigma: Curve


PATHS = {
    "linear": Path(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -jnp.ones_like(t),
        d_sigma=lambda t: jnp.ones_like(t),
    ),
    # SiT's GVP: alpha^2 + sigma^2 = 1
    "cosine": Path(
        alpha=lambda t: jnp.cos(t * jnp.pi / 2),
        sigma=lambda t: jnp.sin(t * jnp.pi / 2),
        d_alpha=lambda t: -jnp.sin(t * jnp.pi / 2) * jnp.pi / 2,
        d_sigma=lambda t: jnp.cos(t * jnp.pi / 2) * jnp.pi / 2,
    ),
}


def make(name: str) -> Path:
    """The path `name`: `linear` or `cosine`."""
    if name not in PATHS:
        raise ConfigError(f"unknown path {name!r}; {suggestion(name, PATHS)}")
    return PATHS[name]


def over_image(t: Float[Array, " b"]) -> Float[Array, "b 1 1 1"]:
    """Times with the axes to multiply images."""
    return t[:, None, None, None]


def interpolate(
    path: Path, x: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], t: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """x_t, the point at time t between data and noise."""
    t = over_image(t)
    return path.alpha(t) * x + path.sigma(t) * noise


def velocity(
    path: Path, x: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], t: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """dx_t / dt, what a velocity network regresses."""
    t = over_image(t)
    return path.d_alpha(t) * x + path.d_sigma(t) * noise


def score_from_velocity(
    path: Path, v: Float[Array, "*shape"], x: Float[Array, "*shape"], t: Float[Array, ""]
) -> Float[Array, "*shape"]:
    """The score of the marginal at time t > 0 from its velocity (SiT, Eq. 9), written without alpha / alpha'."""
    alpha, sigma, d_alpha, d_sigma = (curve(t) for curve in path)
    return (alpha * v - d_alpha * x) / (sigma * (d_alpha * sigma - alpha * d_sigma))
