"""What a trained network predicts (`Objective.predicts`). The sampler reads it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from diversedit_jax.diffusion.discrete import Schedule
from diversedit_jax.diffusion.paths import PATHS, Path


class Flow(NamedTuple):
    """The velocity, noise, score or data at a point of a path.

    path:       the interpolant between data and noise.
    prediction: one of `paths.PREDICTIONS`.
    token:      width of the class token that the network denoises together with x. None: there is none.
    time_scale: the network is given time_scale t.
    """

    path: Path = PATHS["linear"]
    prediction: str = "velocity"
    token: int | None = None
    time_scale: float = 1.0


class Diffusion(NamedTuple):
    """The noise, and perhaps the variance, of a discrete diffusion. schedule: all steps of training."""

    schedule: Schedule


class AverageVelocity(NamedTuple):
    """The average velocity over a span of times on the linear path (MeanFlow, arXiv 2505.13447)."""


def network_time(predicts: Any, t: Array) -> Array:
    """t in [0, 1] as `Forward.rerun` takes it: the step of a discrete diffusion, from 0, else t itself."""
    return jnp.round(t * (predicts.schedule.num_timesteps - 1)) if isinstance(predicts, Diffusion) else t
