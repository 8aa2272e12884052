"""Distributions of the training time t in [0, 1), and intervals of times."""

from collections.abc import Sequence
from functools import partial

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of


def uniform(key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
    """t ~ U(0, 1), as in SiT, REPA and DiverseDiT."""
    return jax.random.uniform(key, (n,))


def logit_normal(key: PRNGKeyArray, n: int, *, mean: float, std: float) -> Float[Array, " n"]:
    """logit(t) ~ N(mean, std^2) (Esser et al., arXiv 2403.03206, Eq. 19)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))


def make(name: str, *, mean: float, std: float):
    """A distribution as a function (key, n) -> t. name: `uniform`, or `logit_normal` with `mean` and `std`."""
    known = {"uniform": uniform, "logit_normal": partial(logit_normal, mean=mean, std=std)}
    in_range("time_std", std, above=0)
    return known[one_of("time", name, known)]


def check_interval(option: str, interval: Sequence[float]) -> tuple[float, float]:
    """`interval` as (lo, hi), if it is two times with 0 <= lo <= hi <= 1."""
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ConfigError(f"{option} = {tuple(interval)}: must be two times with 0 <= lo <= hi <= 1")
    return tuple(interval)
