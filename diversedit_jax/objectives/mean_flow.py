"""MeanFlow: the network regresses the average velocity between two times, by which one step leads from noise to data
(arXiv 2505.13447)."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from diversedit_jax.api import Batch, Forward, Network, Objective
from diversedit_jax.diffusion import paths, times
from diversedit_jax.diffusion.paths import PATHS
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion


def regress(
    network: Network,
    x: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    r: Float[Array, " b"],
    y: Int[Array, " b"],
    dropped: Bool[Array, " b"],
    null: int,
    *,
    omega: float = 1.0,
    kappa: float = 0.5,
    interval: tuple[float, float] = (0.0, 1.0),
    power: float = 1.0,
    eps: float = 0.01,
) -> Forward:
    """The squared error of the average velocity from t back to r <= t, summed over each example's elements, in float32.

    The target is v - (t - r) du/dt, the MeanFlow identity (section 4.1), with du/dt along the flow and v guided where
    the label is kept (see `guided_velocity`); no gradient passes through it. The loss is e / (e + eps)^power, its
    denominator a constant (section 4.3); power 0 leaves the error as it is. Features are those of the primal pass.

    y: labels of all examples; where `dropped`, the network is given `null` in their place, and v is not guided.
    Metrics: `raw`, the mean of e; `v_loss`, the mean squared distance to the velocity, summed over elements as well.
    """
    path = PATHS["linear"]

    def predict(x_t, t, y, span):
        u, features = network(x_t, t, y, span=span)
        if u.shape != x.shape:
            raise ConfigError(f"the network predicts {u.shape[1:]}, MeanFlow needs {x.shape[1:]}")
        return u.astype(jnp.promote_types(u.dtype, jnp.float32)), features

    x_t, v = paths.interpolate(path, x, noise, t), paths.velocity(path, x, noise, t)
    guided = guided_velocity(predict, x_t, v, t, y, null, omega, kappa, interval)
    guided = jnp.where(dropped[:, None, None, None], v, guided)
    y = jnp.where(dropped, null, y)

    # r stays where it is: the span grows with t.
    moving = guided, jnp.ones_like(t), jnp.ones_like(t)
    u, du_dt, features = jax.jvp(lambda x_t, t, span: predict(x_t, t, y, span), (x_t, t, t - r), moving, has_aux=True)
    target = jax.lax.stop_gradient(guided - paths.over_image(jnp.clip(t - r, 0, 1)) * du_dt)
    error = _squared(u - target)
    loss = error / jax.lax.stop_gradient((error + eps) ** power)
    metrics = {"raw": error.mean(), "v_loss": _squared(u - v).mean()}
    return Forward(loss, x, noise, t, x_t, y, features, metrics, Partial(run_at, x, noise, r, y))


def guided_velocity(
    network: Network,
    x_t: Float[Array, "b h w c"],
    v: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    y: Int[Array, " b"],
    null: int,
    omega: float,
    kappa: float,
    interval: tuple[float, float],
) -> Float[Array, "b h w c"]:
    """omega v + (1 - omega - kappa) u(null) + kappa u(y) while lo <= t <= hi, else v; a constant.

    u is the network's own velocity, at span 0. The guidance that a sampler would give at a scale of omega / (1 - kappa)
    is thus learned (section 4.2 and the appendix). A pass that would count nothing is not made.
    """
    low, high = interval
    total = omega * v
    for weight, labels in ((1 - omega - kappa, jnp.full_like(y, null)), (kappa, y)):
        if weight:
            total += weight * network(x_t, t, labels, span=jnp.zeros_like(t))[0]
    inside = (low <= t) & (t <= high)
    return jax.lax.stop_gradient(jnp.where(inside[:, None, None, None], total, v))


def run_at(x: Array, noise: Array, r: Array, y: Array, network: Network, t: Float[Array, " b"]):
    """The network's output at other times t, the end r of the span where it was, if not after t (`Forward.rerun`)."""
    return network(paths.interpolate(PATHS["linear"], x, noise, t), t, y, span=jnp.maximum(t - r, 0))


def _squared(error: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    return jnp.sum(error**2, axis=(1, 2, 3))


def first(number: Int[Array, " g"] | int, b: int, groups: int) -> Bool[Array, " b"]:
    """True for the first `number` examples of each of `groups` equal parts of a batch of b."""
    chosen = jnp.arange(b // groups) < jnp.reshape(number, (-1, 1))
    return jnp.broadcast_to(chosen, (groups, b // groups)).reshape(b)


def make(
    num_classes: int,
    *,
    equal: float = 0.75,
    positional: bool = True,
    label_drop: float = 0.1,
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
    """The objective of MeanFlow, by default as its authors train the size B; of a model with `second_time`.

    equal: the portion of examples with r = t, whose target is the velocity itself: the first of the batch (positional)
        or each example with this probability. For the others t and r are the later and earlier of two draws.
    label_drop: the probability with which a label becomes the null label, `num_classes`: drop = `independent`, or
        `first`, which draws their number alike and drops those of the first examples. Then, with `positional`, the
        network hardly sees the null label with r < t, and `cfg_scale` has nothing to hold on to in long steps.
    groups: parts of the batch in which the first are counted: its authors' devices.
    omega, kappa, guidance_interval: see `guided_velocity`. 1 and 0: no guidance, and no passes for it.
    power, eps: of the loss's weight, see `regress`.
    time, time_mean, time_std: of both draws, see `times.make`.
    """
    for name, value in (("equal", equal), ("label_drop", label_drop)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} must be a probability, given {value}")
    if drop not in ("first", "independent"):
        raise ConfigError(f"unknown drop {drop!r}; {suggestion(drop, ('first', 'independent'))}")
    if groups < 1:
        raise ConfigError(f"groups = {groups}: must be positive")
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"guidance_interval = {low}, {high}: must be two times with 0 <= lo <= hi <= 1")
    if not 0 <= kappa < 1:
        raise ConfigError(f"kappa = {kappa}: must be in [0, 1), the scale of guidance is omega / (1 - kappa)")
    if power < 0 or eps <= 0:
        raise ConfigError(f"power = {power}, eps = {eps}: must not be negative, and eps must be positive")
    draw_times = times.make(time, mean=time_mean, std=time_std)
    options = {"omega": omega, "kappa": kappa, "interval": (low, high), "power": power, "eps": eps}

    def objective(network: Network, batch: Batch, key: Array) -> Forward:
        keys = jax.random.split(key, 5)
        x, y = batch["x"], batch["y"]
        b = len(x)
        if b % groups:
            raise ConfigError(f"a batch of {b} is not divisible by groups = {groups}")
        t, r = (pick(draw_times(keys[0], b), draw_times(keys[1], b)) for pick in (jnp.maximum, jnp.minimum))
        same = (
            first(int(equal * (b // groups)), b, groups) if positional else jax.random.bernoulli(keys[2], equal, (b,))
        )
        noise = jax.random.normal(keys[3], x.shape)
        dropped = jax.random.bernoulli(keys[4], label_drop, (b,))
        if drop == "first":
            dropped = first(dropped.reshape(groups, -1).sum(axis=1), b, groups)
        return regress(network, x, noise, t, jnp.where(same, t, r), y, dropped, num_classes, **options)

    return objective
