"""Measure whether auxiliary losses pull the blocks where the objective pulls them: cosines of their gradients."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax import sharding
from diversedit_jax.analysis.features import Learned, context, forward
from diversedit_jax.api import AuxLoss, Batch, Params
from diversedit_jax.codecs import encoded
from diversedit_jax.runs.build import Experiment


class Pull(NamedTuple):
    """The gradient of an auxiliary loss beside the objective's, in the parameters of each block. Means over batches.

    cosine: of the two gradients, NaN if one is zero. spread: its standard deviation over batches.
    ratio: the length of the loss's gradient over that of the objective's.
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
    """Compare the gradient of each loss at full weight (`Term.full`) with the objective's, at the times of training."""
    blocks = experiment.components.model.blocks

    @jax.jit(out_shardings=sharding.replicated(experiment.layout))
    def products(learned, frozen, batch, step, key):  # of gradients: objective and loss, objective alone, loss alone
        key_codec, key_objective, key_losses = jax.random.split(key, 3)
        ready = encoded(experiment.components.codec, frozen, batch, key_codec)

        def passed(params):
            return forward(experiment, {**learned, "params": params}, frozen, ready, key_objective)

        def term(params, label, key):
            own = context(experiment, learned, frozen, key, loss=label)._replace(step=step)
            found = losses[label].apply(passed(params), ready, own)
            return found.loss if found.full is None else found.full

        params, found = learned["params"], {}
        first = blocks(jax.grad(lambda params: passed(params).loss.mean())(params))
        for number, label in enumerate(losses):
            grads = blocks(jax.grad(term)(params, label, jax.random.fold_in(key_losses, number)))
            found[label] = tuple(_by_block(a, b) for a, b in ((first, grads), (first, first), (grads, grads)))
        return found

    found, key = [], jax.random.key(seed)
    for number, batch in enumerate(shown):
        found.append(jax.device_get(products(learned, frozen, batch, jnp.int32(step), jax.random.fold_in(key, number))))
    pulled = {}
    for label in losses:
        both, objective, own = (np.stack([one[label][i] for one in found]) for i in range(3))
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.where(own > 0, both / np.sqrt(objective * own), np.nan)
            ratio = np.sqrt(own / objective).mean(axis=0)
        spread = cosine.std(axis=0, ddof=1) if len(found) > 1 else np.zeros_like(ratio)
        pulled[label] = Pull(cosine.mean(axis=0), spread, ratio)
    return pulled


def _by_block(a: Sequence[Params], b: Sequence[Params]) -> Float[Array, " l"]:
    """Compute the inner product of two gradients for each block."""
    products = jax.tree.map(lambda u, v: jnp.sum(u * v), list(a), list(b))
    return jnp.stack([sum(jax.tree.leaves(block)) for block in products])
