"""The official SiT (arXiv 2401.08740) seen from outside as any network of ours: t = 0 is data, c output channels.

Inside it is `models.dit` with the official parameters unchanged: time runs from noise (t = 0) to data (t = 1), and the
second half of its 2 c output channels is not used.
"""

import functools

from jaxtyping import Array, Float, Int

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import Model, dit


def turned(model: Model) -> Model:
    """The network of an official SiT in our time: v(x, t) = -v_official(x, 1 - t), of the first c channels."""

    def apply(params: Params, x_t: Float[Array, "b h w c"], t: Float[Array, " b"], y: Int[Array, " b"]):
        prediction, features = model.apply(params, x_t, 1 - t, y)
        return -prediction[..., : x_t.shape[-1]], features

    return Model(model.init, apply)


@functools.wraps(dit.make)
def make(shape: tuple[int, int, int], *args, **options) -> Model:
    """As `dit.make`, with the official output."""
    if options.get("second_time"):
        raise ConfigError("model.second_time: the official SiT has one time; use the model dit")
    return turned(dit.make(shape, *args, **options | {"out_channels": 2 * shape[-1]}))
