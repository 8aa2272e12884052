"""Run a trained network on stored examples for analysis: its features, and its objective. Conditions are never dropped.

`learned` is what a run has learned: `params` of the network, and `losses`, `objective` and `memory` as in the training
state. config.model.capture chooses features before or behind skip connections.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diversedit_jax import conditioning
from diversedit_jax.api import Batch, Context, Features, Forward
from diversedit_jax.codecs import encoded, null_condition
from diversedit_jax.diffusion.predictions import network_time
from diversedit_jax.runs.build import Experiment
from diversedit_jax.runs.trained import Trained

Learned = Mapping[str, Any]


class Streams(NamedTuple):
    """The outputs of the blocks of a network. Prefix tokens are left out.

    text: of the text stream, whose last block gives none. None: the network has no such stream.
    mask: which tokens are text. Without a mask in the condition all count.
    """

    image: Float[Array, "l b n d"]
    text: Float[Array, "m b k e"] | None = None
    mask: Bool[Array, "b k"] | None = None

    def pooled_text(self) -> Float[Array, "m b e"]:
        """The mean token of each text."""
        counts = self.mask.astype(self.text.dtype)[None, :, :, None]
        return (self.text * counts).sum(axis=2) / counts.sum(axis=2)


def learned(found: Trained, step: int, weights: str = "ema") -> Learned:
    """Load what a network has learned until a step. weights: of `trained.WEIGHTS`."""
    return {"params": found.load(step, weights), **found.trained(step)}


def context(experiment: Experiment, learned: Learned, frozen: Any, key: Array, loss: str | None = None) -> Context:
    """Make the context of a loss, or of the objective (None). The teacher has the network's own weights."""
    parts = experiment.components
    null = null_condition(parts.codec, frozen, parts.null)
    memory = learned.get("memory", {})
    params, own_memory = learned.get("objective", {}), memory.get("objective")
    if loss is not None:
        params, own_memory = learned.get("losses", {}).get(loss, {}), memory.get("losses", {}).get(loss)
    teacher = parts.model.network(learned["params"])
    return Context(key, null, params=params, memory=own_memory, teacher=teacher, training=False)


def forward(experiment: Experiment, learned: Learned, frozen: Any, batch: Batch, key: Array) -> Forward:
    """Run the objective on an encoded batch, at times and noise that it draws."""
    parts = experiment.components
    own = context(experiment, learned, frozen, key)
    return parts.objective.apply(parts.model.network(learned["params"]), batch, own)


def features(
    experiment: Experiment, learned: Learned, frozen: Any, batch: Batch, t: Array, key: Array, hidden: Array | bool
) -> Float[Array, "l b n d"]:
    """Compute the output of every block for a stored batch at time t in [0, 1], see `streams`."""
    return streams(experiment, learned, frozen, batch, t, key, hidden).image


def streams(
    experiment: Experiment, learned: Learned, frozen: Any, batch: Batch, t: Array, key: Array, hidden: Array | bool
) -> Streams:
    """Compute the output of every block for a stored batch at time t in [0, 1], also of a text stream.

    hidden: whether the network gets the null condition instead of the examples' own. May be traced.
    """
    parts = experiment.components
    key_codec, key_noise = jax.random.split(key)
    b = len(jax.tree.leaves(batch)[0])
    y = conditioning.select(jnp.broadcast_to(hidden, (b,)), parts.null, batch["y"])
    ready = encoded(parts.codec, frozen, batch | {"y": y}, key_codec)
    return _streams(experiment, learned, frozen, ready, t, key_noise)


def of_encoded(
    experiment: Experiment, learned: Learned, frozen: Any, ready: Batch, t: Array, key: Array
) -> Float[Array, "l b n d"]:
    """Compute the output of every block for an encoded batch at time t in [0, 1]. Prefix tokens are left out."""
    return _streams(experiment, learned, frozen, ready, t, key).image


def _streams(experiment: Experiment, learned: Learned, frozen: Any, ready: Batch, t: Array, key: Array) -> Streams:
    parts, b = experiment.components, len(ready["x"])
    seen = forward(experiment, learned, frozen, ready, key)  # only its noise is used, so jit drops its pass
    time = network_time(parts.objective.predicts, jnp.full(b, t))
    _, found = seen.rerun(parts.model.network(learned["params"]), time)
    image = jnp.stack(found[1:])[:, :, parts.model.prefix :].astype(jnp.float32)
    text = found.text[1:] if isinstance(found, Features) else ()
    if not text:
        return Streams(image)
    mask = ready["y"].get("mask", jnp.ones(text[0].shape[:2], bool))
    return Streams(image, jnp.stack(text).astype(jnp.float32), mask)
