"""Measure how much each skip connection is used: the norms of its weights, and the loss without it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from diversedit_jax import sharding
from diversedit_jax.analysis.features import Learned, forward
from diversedit_jax.api import Batch
from diversedit_jax.codecs import encoded
from diversedit_jax.runs.build import Experiment


class Connections(NamedTuple):
    """The m skip connections of a network, as `api.Skips` lists them.

    pairs:   (from_block, to_block), counted from 1.
    current: norm of the weights that read the current stream. skip: norm of those that read the skip.
    loss:    the objective. cut: the objective without one connection. all_cut: without all of them.
    """

    pairs: tuple[tuple[int, int], ...]
    current: Float[np.ndarray, " m"]
    skip: Float[np.ndarray, " m"]
    loss: float
    cut: Float[np.ndarray, " m"]
    all_cut: float


def used(
    experiment: Experiment, learned: Learned, frozen: Any, shown: Sequence[Batch], seed: int = 0
) -> Connections | None:
    """Measure the connections of a network. None if it has none. All cuts see the same images, times and noise."""
    parts, copied = experiment.components, sharding.replicated(experiment.layout)
    skips = parts.model.skips
    if skips is None:
        return None

    @jax.jit(out_shardings=copied)
    def loss(learned, frozen, batch, key, keep):  # connection i passes keep[i] times its skip
        key_codec, key_objective = jax.random.split(key)
        changed = {**learned, "params": skips.cut(learned["params"], keep)}
        ready = encoded(parts.codec, frozen, batch, key_codec)
        return forward(experiment, changed, frozen, ready, key_objective).loss.mean()

    count = len(skips.pairs)
    current, skip = jax.device_get(jax.jit(skips.norms, out_shardings=copied)(learned["params"]))
    keeps = 1 - np.concatenate([np.zeros((1, count)), np.eye(count), np.ones((1, count))]).astype(np.float32)
    found = np.zeros(len(keeps))
    for number, batch in enumerate(shown):
        key = jax.random.fold_in(jax.random.key(seed), number)
        found += [float(loss(learned, frozen, batch, key, keep)) for keep in keeps]
    found /= len(shown)
    return Connections(skips.pairs, current, skip, float(found[0]), found[1:-1], float(found[-1]))
