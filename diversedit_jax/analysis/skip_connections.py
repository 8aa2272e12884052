"""How much each long residual connection is used: what its Linear weighs, and what is lost when it is cut."""

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


class Connections(NamedTuple):
    """The connections of a network, the innermost first.

    pairs:    (shallow block, deep block), counted from 1.
    current:  Frobenius norm of the half of the Linear that reads the current stream, with the norm's scale.
    skip:     that of the half that reads the shallow block.
    loss:     the objective. cut: the objective with one connection cut; all_cut: with all of them.
    """

    pairs: tuple[tuple[int, int], ...]
    current: Float[np.ndarray, " m"]
    skip: Float[np.ndarray, " m"]
    loss: float
    cut: Float[np.ndarray, " m"]
    all_cut: float


def used(subject: Subject, params: Params, shown: Sequence[Batch], seed: int = 0) -> Connections | None:
    """The connections of a network, None if it has none. The objective is that of training, without label drop.

    A connection is cut where its Linear reads it, so that the LayerNorm before it stays as it is. All cuts see the same
    images, times and noise.
    """
    if "merges" not in params:
        return None
    count, _, width = params["merges"]["linear"]["kernel"].shape
    copied = sharding.replicated(subject.layout)
    current, skip = jax.device_get(jax.jit(_halves, out_shardings=copied)(params["merges"]))
    run = jax.jit(partial(_loss, subject, width), out_shardings=copied)
    cuts = np.concatenate([np.zeros((1, count)), np.eye(count), np.ones((1, count))]).astype(np.float32)
    found = np.zeros(len(cuts))
    for number, batch in enumerate(shown):
        key = jax.random.fold_in(jax.random.key(seed), number)
        found += [float(run(params, subject.frozen, batch, key, cut)) for cut in cuts]
    found /= len(shown)
    depth = sum(len(jax.tree.leaves(params[half])[0]) for half in ("shallow", "deep"))
    pairs = tuple((count - i, depth - count + i + 1) for i in range(count))
    return Connections(pairs, current, skip, float(found[0]), found[1:-1], float(found[-1]))


def _halves(merges: Params) -> list[Float[Array, " m"]]:
    """The norms of the two halves of every Linear, [m 2d d], its inputs scaled as the norm before it does."""
    kernel = merges["linear"]["kernel"]
    weights = kernel if "norm" not in merges else kernel * merges["norm"]["scale"][..., None]
    return [jnp.linalg.norm(half.reshape(len(half), -1), axis=1) for half in jnp.split(weights, 2, axis=1)]


def _loss(subject: Subject, width: int, params: Params, frozen: Any, batch: Batch, key: Array, cut: Array) -> Array:
    """The objective where connection m is scaled by 1 - cut[m]."""
    merges = params["merges"]
    kernel = merges["linear"]["kernel"].at[:, width:].multiply((1 - cut)[:, None, None])
    changed = params | {"merges": merges | {"linear": merges["linear"] | {"kernel": kernel}}}
    key_prepare, key_objective = jax.random.split(key)
    prepared = subject.parts.codec.encode(frozen, batch, key_prepare)
    return subject.parts.objective(subject.parts.model.network(changed), prepared, key_objective).loss.mean()
