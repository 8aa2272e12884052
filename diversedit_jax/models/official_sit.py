"""The official SiT (arXiv 2401.08740) with our conventions: t = 0 is data, and the output has c channels.

The network inside is `models.dit` with the official parameters. Its time runs from noise (t = 0) to data (t = 1). The
second half of its 2 c output channels is not used.
"""

import functools
from collections.abc import Mapping

from jaxtyping import Array, Float

from diversedit_jax.api import Condition, Model, Params, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import check_inputs, dit


def turned(model: Model) -> Model:
    """The network of an official SiT in our time: v(x, t) = -v_official(x, 1 - t), first c channels only."""

    def apply(params: Params, x_t: Float[Array, "b *s c"], t: Float[Array, " b"], y: Condition):
        prediction, features = model.apply(params, x_t, 1 - t, y)
        return -prediction[..., : x_t.shape[-1]], features

    return model._replace(apply=apply)


@functools.wraps(dit.make)
def make(space: Space, inputs: Mapping[str, tuple[int, ...]], read_blocks: tuple[int, ...] = (), **options) -> Model:
    """As `models.dit.make`, with the official output."""
    check_inputs("official_sit", inputs, ())
    wanted = 2 * space.shape[-1]
    if options.get("out_channels") not in (None, wanted):
        raise ConfigError(f"model.out_channels = {options['out_channels']}: official_sit has {wanted}")
    return turned(dit.make(space, inputs, read_blocks, **options | {"out_channels": wanted}))
