"""Distributions of the training time t in [0, 1)."""

from functools import partial

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from diversedit_jax.registry import in_range, one_of


def uniform(key: PRNGKeyArray, n: int) -> Float[Array, " n"]:
    """t ~ U(0, 1), as in SiT, REPA and DiverseDiT."""
    return jax.random.uniform(key, (n,))


def logit_normal(key: PRNGKeyArray, n: int, *, mean: float, std: float) -> Float[Array, " n"]:
    """logit(t) ~ N(mean, std^2) (Esser et al., arXiv 2403.03206, Eq. 19)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))


def make(name: str, *, mean: float, std: float):
    """The distribution `name`, `uniform` or `logit_normal`, as a function (key, n) -> t. Uniform has no parameters."""
    known = {"uniform": uniform, "logit_normal": partial(logit_normal, mean=mean, std=std)}
    in_range("time_std", std, above=0)
    return known[one_of("time", name, known)]
