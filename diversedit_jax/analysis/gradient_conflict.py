"""Whether auxiliary losses pull the blocks where the objective pulls them: cosines of their gradients."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax import sharding
from diversedit_jax.analysis.features import Learned, context, forward, prepared
from diversedit_jax.api import AuxLoss, Batch, Params
from diversedit_jax.runs.build import Experiment


class Pull(NamedTuple):
    """An auxiliary loss beside the objective, in the parameters of each block; means over batches.

    cosine: of the two gradients, NaN where one is zero. ratio: the length of the loss's to that of the objective's.
    spread: of the cosine over batches, a standard deviation.
    """

    cosine: Float[np.ndarray, " l"]
    spread: Float[np.ndarray, " l"]
    ratio: Float[np.ndarray, " l"]


def pulls(
    experiment: Experiment,
    losses: Mapping[str, AuxLoss],
    learned: Learned,
    frozen: Any,
    shown: Sequence[Batch],
    step: int,
    seed: int = 0,
) -> dict[str, Pull]:
    """By loss. Each stands at its full weight (`Term.full`), on the times and noise of training, with all conditions.

    Takes one backward pass for each loss, and one for the objective, a batch. The teacher has the same weights.
    """
    run = jax.jit(partial(_products, experiment, losses), out_shardings=sharding.replicated(experiment.layout))
    found = []
    for number, batch in enumerate(shown):
        key = jax.random.fold_in(jax.random.key(seed), number)
        found.append(jax.device_get(run(learned, frozen, batch, jnp.int32(step), key)))
    pulled = {}
    for label in losses:
        dots, own, other = (np.stack([one[label][i] for one in found]) for i in range(3))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.where(other > 0, dots / np.sqrt(own * other), np.nan)
            ratio = np.sqrt(other / own).mean(axis=0)
        spread = cosine.std(axis=0, ddof=1) if len(found) > 1 else np.zeros_like(ratio)
        pulled[label] = Pull(cosine.mean(axis=0), spread, ratio)
    return pulled


def _products(
    experiment: Experiment,
    losses: Mapping[str, AuxLoss],
    learned: Learned,
    frozen: Any,
    batch: Batch,
    step: Array,
    key: Array,
) -> dict[str, tuple[Array, Array, Array]]:
    """For each loss the products by block: with the objective's gradient, of that with itself, and of its own."""
    key_codec, key_objective, key_losses = jax.random.split(key, 3)
    ready = prepared(experiment, frozen, batch, key_codec)
    blocks = experiment.components.model.blocks

    def passed(params: Params):
        return forward(experiment, {**learned, "params": params}, frozen, ready, key_objective)

    def term(params: Params, label: str, number: int) -> Array:
        key = jax.random.fold_in(key_losses, number)
        own = context(experiment, learned, frozen, key, loss=label)._replace(step=step)
        found = losses[label].apply(passed(params), ready, own)
        return found.loss if found.full is None else found.full

    params = learned["params"]
    first = blocks(jax.grad(lambda params: passed(params).loss.mean())(params))
    found = {}
    for number, label in enumerate(losses):
        grads = blocks(jax.grad(term)(params, label, number))
        found[label] = tuple(_by_block(a, b) for a, b in ((first, grads), (first, first), (grads, grads)))
    return found


def _by_block(a: Sequence[Params], b: Sequence[Params]) -> Float[Array, " l"]:
    """Inner products of two gradients, a number for each block."""
    return jnp.stack([_product(x, y) for x, y in zip(a, b, strict=True)])


def _product(x: Params, y: Params) -> Array:
    """The inner product of two pytrees."""
    return sum(jax.tree.leaves(jax.tree.map(lambda u, v: jnp.sum(u * v), x, y)))
