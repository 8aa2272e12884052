"""Whether auxiliary losses pull the blocks where the objective pulls them: cosines of their gradients."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax import sharding
from diversedit_jax.analysis.subject import Subject
from diversedit_jax.api import Batch, Params

HALVES = ("shallow", "deep")  # parameters of blocks, with a leading layer axis


class Pull(NamedTuple):
    """An auxiliary loss beside the objective, in the parameters of each block; means over batches.

    cosine: of the two gradients, NaN where one is zero. ratio: the length of the loss's to that of the objective's.
    spread: of the cosine over batches, a standard deviation.
    """

    cosine: Float[np.ndarray, " l"]
    spread: Float[np.ndarray, " l"]
    ratio: Float[np.ndarray, " l"]


def pulls(
    subject: Subject, params: Params, heads: Params, shown: Sequence[Batch], step: int, seed: int = 0
) -> dict[str, Pull]:
    """By loss. The losses are those of training, on its times and noise, without label drop, as they weigh at a step;
    but the diversity loss stands at full weight.

    Takes one backward pass for each loss, and one for the objective, a batch. The teacher has the same weights.
    """
    run = jax.jit(partial(_products, subject), out_shardings=sharding.replicated(subject.layout))
    found = []
    for number, batch in enumerate(shown):
        key = jax.random.fold_in(jax.random.key(seed), number)
        found.append(jax.device_get(run(params, heads, subject.frozen, batch, jnp.int32(step), key)))
    pulled = {}
    for label in subject.parts.losses:
        dots, own, other = (np.stack([one[label][i] for one in found]) for i in range(3))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.where(other > 0, dots / np.sqrt(own * other), np.nan)
            ratio = np.sqrt(other / own).mean(axis=0)
        spread = cosine.std(axis=0, ddof=1) if len(found) > 1 else np.zeros_like(ratio)
        pulled[label] = Pull(cosine.mean(axis=0), spread, ratio)
    return pulled


def _products(subject: Subject, params: Params, heads: Params, frozen: Any, batch: Batch, step: Array, key: Array):
    """For each loss the products by block: with the objective's gradient, of that with itself, and of its own."""
    parts = subject.parts
    key_prepare, key_objective, key_losses = jax.random.split(key, 3)
    prepared = parts.codec.encode(frozen, batch, key_prepare)
    teacher = parts.model.network(params)

    def forward(params: Params):
        return parts.objective(parts.model.network(params), prepared, key_objective)

    def term(params: Params, label: str, number: int) -> Array:
        key = jax.random.fold_in(key_losses, number)
        return parts.losses[label].apply(heads[label], forward(params), prepared, teacher, step, key)[0]

    def of_blocks(grads: Params) -> list[Params]:
        return [grads[half] for half in HALVES]

    first = of_blocks(jax.grad(lambda params: forward(params).loss.mean())(params))
    found = {}
    for number, label in enumerate(parts.losses):
        grads = of_blocks(jax.grad(term)(params, label, number))
        found[label] = tuple(_by_block(a, b) for a, b in ((first, grads), (first, first), (grads, grads)))
    return found


def _by_block(a: list[Params], b: list[Params]) -> Float[Array, " l"]:
    """Inner products of two gradients, a number for each block."""

    def product(x: Params, y: Params) -> Array:
        leaves = jax.tree.map(lambda u, v: jnp.sum(u * v, axis=tuple(range(1, u.ndim))), x, y)
        return sum(jax.tree.leaves(leaves))

    return jnp.concatenate([product(x, y) for x, y in zip(a, b, strict=True)])
