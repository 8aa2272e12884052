"""DDPM as DiT trains it: the network predicts the noise of a discrete diffusion, and its variance, which the
variational bound trains (DiT, arXiv 2212.09748, section 3.1; improved DDPM, arXiv 2102.09672)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from diversedit_jax import conditioning
from diversedit_jax.api import Batch, Condition, Context, Forward, Network, Objective
from diversedit_jax.diffusion import discrete
from diversedit_jax.diffusion.discrete import Schedule
from diversedit_jax.diffusion.paths import per_example
from diversedit_jax.diffusion.predictions import Diffusion
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of


def regress(
    network: Network,
    schedule: Schedule,
    x: Float[Array, "b *s c"],
    noise: Float[Array, "b *s c"],
    t: Int[Array, " b"],
    y: Condition,
    learn_sigma: bool = True,
) -> Forward:
    """The squared error of the predicted noise, and with `learn_sigma` the term of the variational bound at step t.

    schedule: not respaced.
    t: steps, 0 .. num_timesteps - 1. Forward.t has them as floats. The network gets them plus `schedule.first_step`.
    """
    x_t = discrete.diffuse(schedule, x, noise, t)
    step = t.astype(jnp.float32)
    rerun = Partial(partial(run_at, schedule), x, noise, y)
    output, features = rerun(network, step)
    wanted = x.shape[-1] * (2 if learn_sigma else 1)
    if output.shape[-1] != wanted:
        raise ConfigError(
            f"the network predicts {output.shape[-1]} channels, but config.objective.learn_sigma = {learn_sigma} needs "
            f"{wanted}: set config.model.out_channels"
        )
    output = output.astype(jnp.float32)
    predicted, v = discrete.split(output, x.shape[-1])
    loss = jnp.mean((predicted - noise) ** 2, axis=per_example(x))
    metrics = {"mse": loss.mean()}
    if v is not None:
        vb = discrete.bound(schedule, output, x, x_t, t)
        metrics["vb"] = vb.mean()
        loss = loss + vb
    return Forward(loss, x, noise, step, x_t, y, features, metrics, rerun)


def run_at(schedule: Schedule, x: Array, noise: Array, y: Condition, network: Network, step: Float[Array, " b"]):
    """The output of the network at these steps (floats) of the diffusion of x by noise, see `Forward.rerun`."""
    return network(discrete.diffuse(schedule, x, noise, step.astype(jnp.int32)), step + schedule.first_step, y)


def make(
    *,
    num_timesteps: int = 1000,
    betas: str = "linear",
    first_step: int = 0,
    condition_drop: float = 0.1,
    learn_sigma: bool = True,
) -> Objective:
    """The objective of DiT, with its defaults.

    That of U-ViT (arXiv 2209.12152) has betas = "scaled_linear", first_step = 1 and learn_sigma = False.

    num_timesteps:  steps of the diffusion.
    betas:          `linear`, from 1e-4 to 0.02 (at 1000 steps), or `scaled_linear`, that of latent diffusion.
    first_step:     0, or 1: the network is given the steps counted from it.
    condition_drop: the probability that a condition becomes the null condition.
    learn_sigma:    the network has twice the channels (`config.model.out_channels`). The second half gives the
        variance.
    """
    in_range("condition_drop", condition_drop, 0, 1)
    in_range("first_step", first_step, 0, 1)
    schedule = discrete.SCHEDULES[one_of("betas", betas, discrete.SCHEDULES)](num_timesteps)
    schedule = schedule._replace(first_step=first_step)

    def apply(network: Network, batch: Batch, context: Context) -> Forward:
        key_t, key_noise, key_drop = jax.random.split(context.key, 3)
        x = batch["x"]
        t = jax.random.randint(key_t, (len(x),), 0, num_timesteps)
        noise = jax.random.normal(key_noise, x.shape)
        y = conditioning.drop(key_drop, batch, context, condition_drop)
        return regress(network, schedule, x, noise, t, y, learn_sigma)

    return Objective(apply, predicts=Diffusion(schedule), learns_null=condition_drop > 0)
