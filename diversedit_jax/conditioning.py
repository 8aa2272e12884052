"""Conditions of any kind: dropped for guidance, paired with the null condition, chosen for samples.

A condition is a pytree of arrays [b ...]: labels, text features with a mask, or nothing at all. A null condition has no
batch axis: it belongs to one example.
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

RULES = ("balanced", "uniform", "data", "shuffled")  # how the conditions of samples are chosen
HELD_OUT = RULES[2:]  # those that read the data


def nulls(null: Condition, b: int) -> Condition:
    """The null condition b times, [b ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (b, *jnp.shape(leaf))), null)


def select(mask: Bool[Array, " b"], chosen: Condition, other: Condition) -> Condition:
    """`chosen` for the examples where the mask is true, else `other`. One of them may lack the batch axis."""

    def leaf(a: Any, b: Any) -> Array:
        rank = max(jnp.ndim(a), jnp.ndim(b))
        return jnp.where(mask.reshape(-1, *(1,) * (rank - 1)), a, b)

    return jax.tree.map(leaf, chosen, other)


def drop(key: Array, batch: Batch, context: Context, probability: float) -> Condition:
    """The conditions of a batch. Each becomes the null condition with this probability, so that guidance can use it.

    One draw decides for all arrays of an example. Outside training (`context.training` is False) none is dropped.
    """
    if not context.training:
        return batch["y"]
    return select(jax.random.bernoulli(key, probability, (len(batch["x"]),)), context.null, batch["y"])


def paired(y: Condition, null: Condition) -> Condition:
    """Each condition, followed by the null condition, [2 b ...]. In this order a sharded batch stays where it is."""

    def leaf(a: Array, n: Any) -> Array:
        return jnp.stack([a, jnp.broadcast_to(n, a.shape)], axis=1).reshape(-1, *a.shape[1:])

    return jax.tree.map(leaf, y, null)


def labels(rule: str, num: int, classes: int, seed: int) -> Int[np.ndarray, " n"]:
    """`num` labels: `balanced`, each class in turn, or `uniform`, drawn from a seed. A larger `num` only appends.

    Without classes (0) every label is the null label, 0.
    """
    if one_of("labels", rule, RULES[:2]) == "balanced":
        return np.resize(np.arange(max(classes, 1), dtype=np.int32), num)
    return np.random.Generator(np.random.Philox(seed)).integers(0, max(classes, 1), num).astype(np.int32)


def chosen(
    rule: str | None, num: int, conditions: Conditions, seed: int, held_out: Callable[[int, bool], Condition]
) -> Condition:
    """The conditions of `num` samples, on the host. A larger `num` only appends.

    rule: `balanced` and `uniform` are for labels. `data` takes the conditions of held-out examples in their order, of
        several captions the first. `shuffled` takes held-out examples in an order drawn from the seed, none of them
        twice, and of several captions one drawn from the seed. None: `balanced` for labels, `data` for all others.
    held_out: (num, whether they are shuffled) -> conditions of `num` held-out examples.
    """
    if rule is None:
        rule = "data" if conditions.classes is None else "balanced"
    if one_of("labels", rule, RULES) in HELD_OUT:
        return held_out(num, rule == "shuffled")
    if conditions.classes is None:
        other = "but these data have other conditions: use 'data' or 'shuffled'"
        raise ConfigError(f"labels = {rule!r} is for labels, {other}")
    return labels(rule, num, conditions.classes, seed)


def taken(y: Condition, first: int, count: int) -> Condition:
    """`count` conditions of y [n ...] from number `first` on. After the last one comes the first again."""
    numbers = np.arange(first, first + count) % len(jax.tree.leaves(y)[0])
    return jax.tree.map(lambda leaf: leaf[numbers], y)


def check_guidance(cfg_scale: float, conditions: Conditions, learns_null: bool) -> None:
    """Raise ConfigError if a guidance scale is out of range, or if there is nothing to guide by.

    learns_null: see `Objective`.
    """
    in_range("cfg_scale", cfg_scale, 0)
    if conditions.classes == 0 and cfg_scale != 1:
        raise ConfigError(f"cfg_scale = {cfg_scale}: must be 1, because the data have no classes")
    if not learns_null and cfg_scale != 1:
        raise ConfigError(
            f"cfg_scale = {cfg_scale}: must be 1, because the network was trained with condition_drop = 0, without the "
            "null condition"
        )
