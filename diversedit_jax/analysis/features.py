"""What analysis sees of a network: its features for stored examples, and its objective on them.

`learned` is what a run has learned: `params` of the network, and `losses`, `objective` and `memory` as in the training
state. Conditions are never dropped here. Features lie behind skip connections or before them (`config.model.capture`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diversedit_jax import conditioning
from diversedit_jax.api import Batch, Context, Forward
from diversedit_jax.codecs import encoded, null_condition
from diversedit_jax.diffusion.predictions import network_time
from diversedit_jax.runs.build import Experiment
from diversedit_jax.runs.trained import Trained

Learned = Mapping[str, Any]


def learned(found: Trained, step: int, weights: str = "ema") -> Learned:
    """What a network has learned until a step. weights: of `trained.WEIGHTS`."""
    return {"params": found.load(step, weights), **found.trained(step)}


def prepared(experiment: Experiment, frozen: Any, batch: Batch, key: Array) -> Batch:
    """A stored batch as the network takes it."""
    return encoded(experiment.components.codec, frozen, batch, key)


def context(experiment: Experiment, learned: Learned, frozen: Any, key: Array, loss: str | None = None) -> Context:
    """What the objective, or a loss, is given where nobody learns. The teacher has the same weights."""
    parts = experiment.components
    null = null_condition(parts.codec, frozen, parts.null)
    memory = learned.get("memory", {})
    own = learned.get("objective", {}), memory.get("objective")
    if loss is not None:
        own = learned.get("losses", {}).get(loss, {}), memory.get("losses", {}).get(loss)
    teacher = parts.model.network(learned["params"])
    return Context(key, null, params=own[0], memory=own[1], teacher=teacher, training=False)


def forward(experiment: Experiment, learned: Learned, frozen: Any, batch: Batch, key: Array) -> Forward:
    """The objective's pass over a prepared batch, at times and noise of its own."""
    parts = experiment.components
    own = context(experiment, learned, frozen, key)
    return parts.objective.apply(parts.model.network(learned["params"]), batch, own)


def features(
    experiment: Experiment, learned: Learned, frozen: Any, batch: Batch, t: Array, key: Array, hidden: Array | bool
) -> Float[Array, "l b n d"]:
    """The output of every block for a stored batch at time t in [0, 1]; tokens that are not of x are left out.

    hidden: whether the network gets the null condition instead of the examples' own; may be traced.
    """
    parts = experiment.components
    key_codec, key_noise = jax.random.split(key)
    b = len(jax.tree.leaves(batch)[0])
    mask = jnp.broadcast_to(hidden, (b,))
    given = batch | {"y": conditioning.select(mask, parts.null, batch["y"])}
    ready = prepared(experiment, frozen, given, key_codec)
    seen = forward(experiment, learned, frozen, ready, key_noise)  # its noise is used, its pass is not computed
    time = network_time(parts.objective.predicts, jnp.full(b, t))
    _, found = seen.rerun(parts.model.network(learned["params"]), time)
    return jnp.stack(found[1:])[:, :, parts.model.prefix :].astype(jnp.float32)
