"""A probe: the features of a block must tell the condition."""

import jax.numpy as jnp

from diversedit_jax.api import AuxLoss, Term


def make(*, block: int = 2, coefficient: float = 1e-3) -> AuxLoss:
    """|mean over tokens of features[block] W - v|^2 over the running variance of v, which is the loss's memory."""

    def told(y):
        return jnp.where(y["mask"][..., None], y["context"], 0).sum(axis=1)

    def apply(forward, batch, context):
        v = told(forward.y)
        variance = 0.99 * context.memory + 0.01 * v.var()
        error = jnp.mean((forward.features[block].mean(axis=1) @ context.params["kernel"] - v) ** 2) / variance
        return Term(coefficient * error, {"error": error}, memory=variance)

    def init(key, forward, batch):
        return {"kernel": jnp.zeros((forward.features[block].shape[-1], told(forward.y).shape[-1]))}

    return AuxLoss(apply, init, lambda forward, batch: jnp.float32(1), blocks=(block,))
