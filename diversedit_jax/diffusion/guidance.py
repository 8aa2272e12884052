"""Guidance within an interval of times (arXiv 2207.12598, 2404.07724), as a velocity for samplers: by the network's own
unconditional prediction, or by a weaker network (autoguidance, arXiv 2406.02507)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diversedit_jax.api import Network

# (x [b h w c], t, t_step) -> velocity [b h w c]. t_step is the time at which the sampler's step began: the interval is
# tested there, so that all evaluations of one step are guided alike (as in REPA's Heun). For `ddpm_samplers` it is not
# the velocity but the noise, beside which the output may hold further channels.
Velocity = Callable[[Array, Array, Array], Array]

Scalar = Float[Array, ""] | float
Scale = Float[Array, "*c"] | float  # one for all channels, or one per channel


def guide(
    network: Network,
    y: Int[Array, " b"],
    null: int,
    *,
    scale: Scale = 1.0,
    interval: tuple[Scalar, Scalar] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """v_null + scale (v_y - v_null) while lo <= t <= hi, else v_y, which then is all that is computed.

    `scale` and `interval` may be traced: one compiled sampler serves all their values. `channels`: guide only the first
    so many channels and take the others from v_y (DiT and SiT: 3 of 4; REPA and DiverseDiT: None, all).
    """

    def both(x, times):
        # each example beside its unconditional twin, so that a sharded batch stays where it is
        labels = jnp.stack([y, jnp.full_like(y, null)], axis=1).reshape(-1)
        v = network(jnp.repeat(x, 2, axis=0), jnp.repeat(times, 2), labels)[0]
        return v[0::2], v[1::2]

    return _guided(network, y, both, scale, interval, channels)


def autoguide(
    network: Network,
    weak: Network,
    y: Int[Array, " b"],
    *,
    scale: Scale = 1.0,
    interval: tuple[Scalar, Scalar] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """v_weak + scale (v - v_weak) while lo <= t <= hi, else v, and then the weak network does not run.

    `weak`: a smaller or less trained network for the same task; it is given the same labels. As in the paper, this
    takes the place of classifier-free guidance; to have both at once, let `weak` be unconditional, by `unlabelled`. The
    other arguments are those of `guide`.
    """
    return _guided(
        network, y, lambda x, times: (network(x, times, y)[0], weak(x, times, y)[0]), scale, interval, channels
    )


def unlabelled(network: Network, null: int) -> Network:
    """The network without its labels: every one is the null label."""
    return lambda x, t, y: network(x, t, jnp.full_like(y, null))


def over_span(network: Network, span: Scalar) -> Network:
    """A network of two times (MeanFlow) as one of t alone, its span t - r fixed; at span 0 it predicts the velocity."""
    return lambda x, t, y: network(x, t, y, span=jnp.full_like(t, span))


def _guided(
    network: Network,
    y: Int[Array, " b"],
    both: Callable[[Array, Array], tuple[Array, Array]],
    scale: Scale,
    interval: tuple[Scalar, Scalar],
    channels: int | None,
) -> Velocity:
    """The velocity that `both`, (x, times) -> (v, v_guide), gives within the interval, and `network` alone outside."""
    low, high = interval

    def velocity(x: Float[Array, "b h w c"], t: Float[Array, ""], t_step: Float[Array, ""]) -> Float[Array, "b h w k"]:
        times = jnp.full(len(x), t)

        def plain(x):
            return network(x, times, y)[0].astype(x.dtype)

        def guided(x):
            v, v_guide = (part.astype(x.dtype) for part in both(x, times))
            ahead = v_guide + scale * (v - v_guide)
            return ahead if channels is None else jnp.concatenate([ahead[..., :channels], v[..., channels:]], axis=-1)

        active = (low <= t_step) & (t_step <= high) & jnp.any(scale != 1.0)
        return jax.lax.cond(active, guided, plain, x)

    return velocity
