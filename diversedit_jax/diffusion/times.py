"""Distributions of the training time t in [0, 1)."""

from functools import partial

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion


def uniform(key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
    """t ~ U(0, 1), as in SiT, REPA and DiverseDiT."""
    return jax.random.uniform(key, (n,))


def logit_normal(key: PRNGKeyArray, n: int, *, mean: float, std: float) -> Float[Array, " n"]:
    """logit(t) ~ N(mean, std^2) (Esser et al., arXiv 2403.03206, Eq. 19)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))


def make(name: str, *, mean: float, std: float):
    """The distribution `name`, `uniform` or `logit_normal`, as a function (key, n) -> t; uniform has no parameters."""
    known = {"uniform": uniform, "logit_normal": partial(logit_normal, mean=mean, std=std)}
    if name not in known:
        raise ConfigError(f"unknown distribution of times {name!r}; {suggestion(name, known)}")
    if not std > 0:
        raise ConfigError(f"the standard deviation of the times' logit must be positive, given {std}")
    return known[name]
