"""Classifier-free guidance within an interval of times (arXiv 2207.12598, 2404.07724), as a velocity for samplers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diversedit_jax.api import Network

# (x [b h w c], t, t_step) -> velocity [b h w c]. t_step is the time at which the sampler's step began: the interval is
# tested there, so that all evaluations of one step are guided alike (as in REPA's Heun).
Velocity = Callable[[Array, Array, Array], Array]


def guide(
    network: Network,
    y: Int[Array, " b"],
    null: int,
    *,
    scale: Float[Array, ""] | float = 1.0,
    interval: tuple[Float[Array, ""] | float, Float[Array, ""] | float] = (0.0, 1.0),
    channels: int | None = None,
) -> Velocity:
    """v_null + scale (v_y - v_null) while lo <= t <= hi, else v_y, which then is all that is computed.

    `scale` and `interval` may be traced: one compiled sampler serves all their values. `channels`: guide only the first
    so many channels and take the others from v_y (DiT and SiT: 3 of 4; REPA and DiverseDiT: None, all).
    """
    low, high = interval

    def velocity(x: Float[Array, "b h w c"], t: Float[Array, ""], t_step: Float[Array, ""]) -> Float[Array, "b h w c"]:
        times = jnp.full(len(x), t)

        def conditional(x):
            return network(x, times, y)[0].astype(x.dtype)

        def guided(x):
            # each example beside its unconditional twin, so that a sharded batch stays where it is
            labels = jnp.stack([y, jnp.full_like(y, null)], axis=1).reshape(-1)
            both = network(jnp.repeat(x, 2, axis=0), jnp.repeat(times, 2), labels)[0].astype(x.dtype)
            v_y, v_null = both[0::2], both[1::2]
            v = v_null + scale * (v_y - v_null)
            return v if channels is None else jnp.concatenate([v[..., :channels], v_y[..., channels:]], axis=-1)

        active = (low <= t_step) & (t_step <= high) & (scale != 1.0)
        return jax.lax.cond(active, guided, conditional, x)

    return velocity
