"""Conditions of any kind: dropped for guidance, paired with the null condition, chosen for samples.

A condition is a pytree of arrays [b ...]: labels, text features with a mask, or nothing at all. A null condition is
that of one example, without the batch axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from diversedit_jax.api import Batch, Condition, Conditions, Context
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of

RULES = ("balanced", "uniform", "data")  # how the conditions of samples are chosen


def nulls(null: Condition, b: int) -> Condition:
    """The null condition, b times."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (b, *jnp.shape(leaf))), null)


def select(mask: Bool[Array, " b"], chosen: Condition, other: Condition) -> Condition:
    """Example by example `chosen` where the mask is true, else `other`. One of them may lack the batch axis."""

    def leaf(a: Any, b: Any) -> Array:
        rank = max(jnp.ndim(a), jnp.ndim(b))
        return jnp.where(mask.reshape(-1, *(1,) * (rank - 1)), a, b)

    return jax.tree.map(leaf, chosen, other)


def drop(key: Array, batch: Batch, context: Context, probability: float) -> Condition:
    """The conditions of a batch, each replaced by the null condition with this probability, for guidance.

    One draw decides for all arrays of an example. Where nobody learns (`context.training` is False) none is dropped.
    """
    if not context.training:
        return batch["y"]
    return select(jax.random.bernoulli(key, probability, (len(batch["x"]),)), context.null, batch["y"])


def paired(y: Condition, null: Condition) -> Condition:
    """Each condition followed by the null condition, [2 b ...]: a sharded batch stays where it is."""

    def leaf(a: Array, n: Any) -> Array:
        return jnp.stack([a, jnp.broadcast_to(n, a.shape)], axis=1).reshape(-1, *a.shape[1:])

    return jax.tree.map(leaf, y, null)


def labels(rule: str, num: int, classes: int, seed: int) -> Int[np.ndarray, " n"]:
    """`num` labels: `balanced`, each class in turn, or `uniform`, drawn from a seed. The first do not depend on `num`.

    Without classes every label is the null label, 0.
    """
    one_of("labels", rule, RULES[:2])
    if rule == "balanced":
        return np.resize(np.arange(max(classes, 1), dtype=np.int32), num)
    return np.random.Generator(np.random.Philox(seed)).integers(0, max(classes, 1), num).astype(np.int32)


def chosen(
    rule: str | None, num: int, conditions: Conditions, seed: int, held_out: Callable[[int], Condition]
) -> Condition:
    """The conditions of `num` samples, on the host.

    rule: of RULES. `balanced` and `uniform` are for labels; `data` takes those of held-out examples in their order.
        None: `balanced` for labels, `data` for all others.
    held_out: num -> the conditions of so many held-out examples.
    """
    if rule is None:
        rule = "data" if conditions.classes is None else "balanced"
    if one_of("labels", rule, RULES) == "data":
        return held_out(num)
    if conditions.classes is None:
        raise ConfigError(
            f"labels = {rule!r} is for labels, but the conditions of these data are not labels: use 'data'"
        )
    return labels(rule, num, conditions.classes, seed)


def check_guidance(cfg_scale: float, conditions: Conditions) -> None:
    """Raise ConfigError for a scale of guidance that is out of range, or that the data cannot use."""
    in_range("cfg_scale", cfg_scale, 0)
    if conditions.classes == 0 and cfg_scale != 1:
        raise ConfigError(f"cfg_scale = {cfg_scale}: must be 1, the data have no classes to guide to")
