"""Guidance within an interval of times (arXiv 2207.12598, 2404.07724), as a velocity for solvers.

What guides the network is its own prediction without a condition, or a weaker network (autoguidance, arXiv 2406.02507).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diversedit_jax.api import Condition, Network
from diversedit_jax.conditioning import nulls, paired

# (x [b *s c], t, t_step) -> velocity [b *s c]. t_step is the time at which the solver's step began. The interval is
# tested there, so that all evaluations of one step are guided alike, as in REPA's Heun. For `ddpm_solvers` the result
# is not the velocity but the noise, and it may have further channels.
Velocity = Callable[[Array, Array, Array], Array]

Scalar = Float[Array, ""] | float
Scale = Float[Array, "..."] | float  # one for all, or one per element of an example


def guide(
    network: Network,
    y: Condition,
    null: Condition,
    *,
    scale: Scale = 1.0,
    interval: tuple[Scalar, Scalar] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """Classifier-free guidance: v_null + scale (v_y - v_null) while lo <= t <= hi, else v_y alone.

    scale, interval: may be traced, so that one compiled sampler serves all their values.
    channels: guide only the first so many channels; the others are those of v_y (DiT and SiT: 3 of 4; None: all).
    """

    def both(x, times):
        v = network(jnp.repeat(x, 2, axis=0), jnp.repeat(times, 2), paired(y, null))[0]
        return v[0::2], v[1::2]

    return _guided(network, y, both, scale, interval, channels)


def autoguide(
    network: Network,
    weak: Network,
    y: Condition,
    *,
    scale: Scale = 1.0,
    interval: tuple[Scalar, Scalar] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """Autoguidance: v_weak + scale (v - v_weak) while lo <= t <= hi, else v alone, without running the weak network.

    weak: a smaller or less trained network for the same task. It gets the same conditions. As in the paper, this takes
        the place of classifier-free guidance; for both at once let `weak` be `unconditional`.
    The other arguments are those of `guide`.
    """
    return _guided(
        network, y, lambda x, times: (network(x, times, y)[0], weak(x, times, y)[0]), scale, interval, channels
    )


def unconditional(network: Network, null: Condition) -> Network:
    """The network without conditions: every one is the null condition."""
    return lambda x, t, y: network(x, t, nulls(null, len(x)))


def over_span(network: Network, span: Scalar) -> Network:
    """A network of two times (MeanFlow) as one of t alone, with a fixed span t - r. Span 0 gives the velocity."""
    return lambda x, t, y: network(x, t, y, span=jnp.full_like(t, span))


def _guided(
    network: Network,
    y: Condition,
    both: Callable[[Array, Array], tuple[Array, Array]],
    scale: Scale,
    interval: tuple[Scalar, Scalar],
    channels: int | None,
) -> Velocity:
    """The velocity that `both`, (x, times) -> (v, v_guide), gives within the interval, and `network` alone outside."""
    low, high = interval

    def velocity(x: Float[Array, "b *s c"], t: Float[Array, ""], t_step: Float[Array, ""]) -> Float[Array, "b *s k"]:
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
