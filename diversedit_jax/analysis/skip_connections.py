"""How much each skip connection is used: what its weights are, and what is lost when it is cut."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax import sharding
from diversedit_jax.analysis.features import Learned, forward, prepared
from diversedit_jax.api import Batch
from diversedit_jax.runs.build import Experiment


class Connections(NamedTuple):
    """The connections of a network, as `api.Skips` lists them.

    pairs:    (shallow block, deep block), counted from 1.
    current:  norm of the weights that read the current stream.
    skip:     norm of those that read the shallow block.
    loss:     the objective. cut: the objective with one connection cut; all_cut: with all of them.
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
    """The connections of a network, None if it has none. The objective is that of training, with all conditions.

    All cuts see the same images, times and noise.
    """
    skips = experiment.components.model.skips
    if skips is None:
        return None
    count, copied = len(skips.pairs), sharding.replicated(experiment.layout)
    current, skip = jax.device_get(jax.jit(skips.norms, out_shardings=copied)(learned["params"]))
    run = jax.jit(partial(_loss, experiment), out_shardings=copied)
    keeps = 1 - np.concatenate([np.zeros((1, count)), np.eye(count), np.ones((1, count))]).astype(np.float32)
    found = np.zeros(len(keeps))
    for number, batch in enumerate(shown):
        key = jax.random.fold_in(jax.random.key(seed), number)
        found += [float(run(learned, frozen, batch, key, keep)) for keep in keeps]
    found /= len(shown)
    return Connections(skips.pairs, current, skip, float(found[0]), found[1:-1], float(found[-1]))


def _loss(experiment: Experiment, learned: Learned, frozen: Any, batch: Batch, key: Array, keep: Array) -> Array:
    """The objective where connection i passes keep[i] times its skip."""
    changed = experiment.components.model.skips.cut(learned["params"], keep)
    key_codec, key_objective = jax.random.split(key)
    ready = prepared(experiment, frozen, batch, key_codec)
    return forward(experiment, {**learned, "params": changed}, frozen, ready, key_objective).loss.mean()
