"""The official SiT and DiT (arXiv 2401.08740, 2212.09748) behind our contract.

Both have the parameter names that `interop.sit.from_reference` reads, and 2 c output channels: `models.dit` with
`out_channels` = 2 c holds their parameters unchanged. DiT's (noise, variance) is what `objectives.ddpm` takes as it is.
SiT runs time from noise (t = 0) to data (t = 1) and drops its second half of channels: `flow` turns it round.
"""

from jaxtyping import Array, Float, Int

from diversedit_jax.api import Params
from diversedit_jax.models import Model


def flow(model: Model) -> Model:
    """The official SiT's network in our time: v(x, t) = -v_official(x, 1 - t), of the first c channels."""

    def apply(params: Params, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], y: Int[Array, " b"]):
        prediction, features = model.apply(params, x_t, 1 - t, y)
        return -prediction[..., : x_t.shape[-1]], features

    return Model(model.init, apply)
