"""Guidance within an interval of times (arXiv 2207.12598, 2404.07724), as a velocity for solvers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diversedit_jax.api import Condition, Network
from diversedit_jax.conditioning import paired
from diversedit_jax.diffusion.paths import Examples

# (x [b *s c], t, t_step) -> velocity [b *s c]. t_step is the time at which the solver's step began. The interval is
# tested at t_step, so that all evaluations of one step are guided alike, as in REPA's Heun. For `ddpm_solvers` the
# result is the noise, and may have further channels.
Velocity = Callable[[Array, Array, Array], Array]

Scalar = Float[Array, ""] | float
Interval = tuple[Scalar, Scalar]
Scale = Float[Array, "..."] | float  # one for all, or one per element of an example


def guide(
    network: Network,
    y: Condition,
    null: Condition,
    *,
    scale: Scale = 1.0,
    interval: Interval = (0.0, 1.0),
    channels: int | None = None,
    weak: Network | None = None,
) -> Velocity:
    """v_guide + scale (v_y - v_guide) while lo <= t <= hi, else v_y alone, without computing v_guide.

    v_guide is the prediction of the network for the null condition (classifier-free guidance), or that of `weak`.

    scale, interval: may be traced, so that one compiled sampler serves all their values.
    channels: guide only the first channels, so many (DiT and SiT: 3 of 4). None: all.
    weak: a smaller or less trained network for the same task, which gets the same conditions (autoguidance, arXiv
        2406.02507). To add classifier-free guidance, let it use the null condition.
    """
    low, high = interval

    def both(x: Examples, times: Float[Array, " b"]) -> tuple[Array, Array]:
        if weak is not None:
            return network(x, times, y)[0], weak(x, times, y)[0]
        v = network(jnp.repeat(x, 2, axis=0), jnp.repeat(times, 2), paired(y, null))[0]
        return v[0::2], v[1::2]

    def velocity(x: Examples, t: Float[Array, ""], t_step: Float[Array, ""]) -> Float[Array, "b *s k"]:
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


def over_span(network: Network, span: Scalar) -> Network:
    """A network of t alone, from one of two times (MeanFlow), at a fixed span t - r. Span 0 gives the velocity."""
    return lambda x, t, y: network(x, t, y, span=jnp.full_like(t, span))
