"""Denoising with a learned uncertainty (after EDM2, arXiv 2312.02696, Eq. 14): the network predicts the data."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from diversedit_jax import conditioning
from diversedit_jax.api import Forward, Objective
from diversedit_jax.diffusion.paths import PATHS, interpolate, per_example
from diversedit_jax.diffusion.predictions import Flow

LINEAR = PATHS["linear"]


def rerun(x, noise, y, network, t):
    """The network on the same examples at other times."""
    return network(interpolate(LINEAR, x, noise, t), t, y)


def make(*, condition_drop: float = 0.1, sampled: bool = True) -> Objective:
    """mean |D(x_t, t, y) - x|^2 / u + log u with a learned u. Its memory counts examples and averages x.

    sampled: False for an objective that does not say how to sample from its network.
    """

    def apply(network, batch, context):
        key_t, key_noise, key_drop = jax.random.split(context.key, 3)
        x = batch["x"]
        t, noise = jax.random.uniform(key_t, (len(x),)), jax.random.normal(key_noise, x.shape)
        y = conditioning.drop(key_drop, batch, context, condition_drop)
        again = Partial(rerun, x, noise, y)
        prediction, features = again(network, t)
        error = jnp.mean((prediction - x) ** 2, axis=per_example(x))
        log_u = context.params["log_u"]
        memory = {
            "examples": context.memory["examples"] + len(x),
            "mean": 0.9 * context.memory["mean"] + 0.1 * x.mean(axis=0),
        }
        metrics = {"error": error.mean(), "log_u": log_u}
        loss = error / jnp.exp(log_u) + log_u
        return Forward(loss, x, noise, t, interpolate(LINEAR, x, noise, t), y, features, metrics, again, memory)

    def memory(batch):
        return {"examples": jnp.int32(0), "mean": jnp.zeros(batch["x"].shape[1:])}

    predicts = Flow(LINEAR, "data") if sampled else None
    return Objective(apply, predicts, init=lambda key, batch: {"log_u": jnp.float32(0)}, memory=memory)
