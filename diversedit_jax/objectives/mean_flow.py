"""MeanFlow: the network regresses the average velocity between two times, so that one step leads from noise to data
(arXiv 2505.13447)."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from diversedit_jax.api import Batch, Condition, Context, Forward, Network, Objective
from diversedit_jax.conditioning import nulls, select
from diversedit_jax.diffusion import paths, times
from diversedit_jax.diffusion.paths import PATHS, over, per_example
from diversedit_jax.diffusion.predictions import AverageVelocity
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of


def regress(
    network: Network,
    x: Float[Array, "b *s c"],
    noise: Float[Array, "b *s c"],
    t: Float[Array, " b"],
    r: Float[Array, " b"],
    y: Condition,
    dropped: Bool[Array, " b"],
    null: Condition,
    *,
    omega: float = 1.0,
    kappa: float = 0.5,
    interval: tuple[float, float] = (0.0, 1.0),
    power: float = 1.0,
    eps: float = 0.01,
) -> Forward:
    """The squared error of the average velocity from t back to r <= t, summed over each example's elements, in float32.

    The target is v - (t - r) du/dt, the MeanFlow identity (section 4.1), with du/dt along the flow. No gradient passes
    through it. The loss is e / (e + eps)^power with a constant denominator (section 4.3). Power 0 gives e itself.

    y: conditions of all examples. Where `dropped`, the network gets `null` instead, and v is not guided.
    omega, kappa, interval: while lo <= t <= hi, v becomes omega v + (1 - omega - kappa) u(null) + kappa u(y), where u
        is the network's own velocity. The network then learns the guidance that a sampler would give at the scale omega
        / (1 - kappa) (section 4.2 and the appendix). Terms of weight 0 are not computed.
    Metrics: `raw`, the mean of e; `v_loss`, the mean squared distance of u to the velocity, summed like e.
    """
    path = PATHS["linear"]

    def predict(x_t, t, y, span):
        u, features = network(x_t, t, y, span=span)
        if u.shape != x.shape:
            raise ConfigError(f"the network predicts {u.shape[1:]}, but MeanFlow needs {x.shape[1:]}")
        return u.astype(jnp.promote_types(u.dtype, jnp.float32)), features

    x_t, v = paths.interpolate(path, x, noise, t), paths.velocity(path, x, noise, t)
    guided = omega * v
    for weight, given in ((1 - omega - kappa, nulls(null, len(x))), (kappa, y)):
        if weight:
            guided += weight * predict(x_t, t, given, span=jnp.zeros_like(t))[0]
    active = (interval[0] <= t) & (t <= interval[1]) & ~dropped
    guided = jax.lax.stop_gradient(jnp.where(over(active, x), guided, v))
    y = select(dropped, null, y)

    # r stays where it is: the span grows with t.
    moving = guided, jnp.ones_like(t), jnp.ones_like(t)
    u, du_dt, features = jax.jvp(lambda x_t, t, span: predict(x_t, t, y, span), (x_t, t, t - r), moving, has_aux=True)
    target = jax.lax.stop_gradient(guided - over(jnp.clip(t - r, 0, 1), x) * du_dt)
    error, v_error = (jnp.sum((u - wanted) ** 2, axis=per_example(x)) for wanted in (target, v))
    loss = error / jax.lax.stop_gradient((error + eps) ** power)
    metrics = {"raw": error.mean(), "v_loss": v_error.mean()}
    return Forward(loss, x, noise, t, x_t, y, features, metrics, Partial(run_at, x, noise, r, y))


def run_at(x: Array, noise: Array, r: Array, y: Condition, network: Network, t: Float[Array, " b"]):
    """The output of the network at other times t for the same r, or r = t where r > t, see `Forward.rerun`."""
    return network(paths.interpolate(PATHS["linear"], x, noise, t), t, y, span=jnp.maximum(t - r, 0))


def first(number: Int[Array, " g"] | int, b: int, groups: int) -> Bool[Array, " b"]:
    """True for the first `number` examples of each of `groups` equal parts of a batch of b."""
    chosen = jnp.arange(b // groups) < jnp.reshape(number, (-1, 1))
    return jnp.broadcast_to(chosen, (groups, b // groups)).reshape(b)


def make(
    *,
    equal: float = 0.75,
    positional: bool = True,
    condition_drop: float = 0.1,
    drop: str = "first",
    groups: int = 1,
    omega: float = 1.0,
    kappa: float = 0.5,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    power: float = 1.0,
    eps: float = 0.01,
    time: str = "logit_normal",
    time_mean: float = -0.4,
    time_std: float = 1.0,
) -> Objective:
    """The objective of MeanFlow, by default as its authors train the size B.

    equal: the portion of examples with r = t. Their target is the velocity itself. For the others t and r are the later
        and the earlier of two draws.
    positional: the first examples of the batch have r = t. False: each example has, with this probability.
    condition_drop: the probability that a condition becomes the null condition.
    drop: `independent` draws for each example. `first` draws the same number, and the first examples lose their
        conditions. Together with `positional` the network then hardly sees the null condition with r < t, and
        `cfg_scale` cannot guide long steps.
    groups: parts of the batch in which the first examples are counted. For its authors these were devices.
    omega, kappa: see `regress`. 1 and 0 give no guidance at no cost. guidance_interval: guide while t is in it.
    power, eps: of the loss, see `regress`.
    time, time_mean, time_std: of both draws, see `times.make`.
    """
    interval = times.check_interval("guidance_interval", guidance_interval)
    in_range("equal", equal, 0, 1)
    in_range("condition_drop", condition_drop, 0, 1)
    one_of("drop", drop, ("first", "independent"))
    in_range("groups", groups, 1)
    in_range("omega", omega, 0)
    in_range("kappa", kappa, 0, below=1)  # the scale of guidance is omega / (1 - kappa)
    in_range("power", power, 0)
    in_range("eps", eps, above=0)
    if condition_drop == 0 and (omega, kappa) != (1, 0):
        raise ConfigError(
            f"omega = {omega}, kappa = {kappa}: guidance needs condition_drop above 0, for the null condition"
        )
    draw_times = times.make(time, mean=time_mean, std=time_std)
    options = {"omega": omega, "kappa": kappa, "interval": interval, "power": power, "eps": eps}

    def apply(network: Network, batch: Batch, context: Context) -> Forward:
        keys = jax.random.split(context.key, 5)
        x, b = batch["x"], len(batch["x"])
        parts = groups if context.training else 1
        if b % parts:
            raise ConfigError(f"config.objective.groups = {parts} must divide the batch of {b}")
        t, r = (pick(draw_times(keys[0], b), draw_times(keys[1], b)) for pick in (jnp.maximum, jnp.minimum))
        same = first(int(equal * (b // parts)), b, parts) if positional else jax.random.bernoulli(keys[2], equal, (b,))
        noise = jax.random.normal(keys[3], x.shape)
        dropped = jax.random.bernoulli(keys[4], condition_drop if context.training else 0.0, (b,))
        if drop == "first":
            dropped = first(dropped.reshape(parts, -1).sum(axis=1), b, parts)
        return regress(network, x, noise, t, jnp.where(same, t, r), batch["y"], dropped, context.null, **options)

    return Objective(apply, predicts=AverageVelocity(), inputs={"span": ()}, learns_null=condition_drop > 0)
