"""Networks in Flax NNX, one model per file; to the rest of the package a network is two pure functions."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array

from diversedit_jax import registry
from diversedit_jax.api import Network, Params
from diversedit_jax.errors import ConfigError

PRECISIONS = ("highest", "high", "default")  # of products, in jax's words; on a CPU all of them are float32


class Model(NamedTuple):
    """A network as pure functions over a nested dict of arrays.

    init:  key -> params.
    apply: (params, x_t, t, y, **conditions) -> (prediction, features).
    token_width: of the class token that the network takes and predicts beside the image (REG), None if it has none.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., tuple[Array, Sequence[Array]]]
    token_width: int | None = None

    def network(self, params: Params) -> Network:
        """The network with its parameters bound."""
        return partial(self.apply, params)


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The module that `build` makes, split once: jit then sees plain dicts, which dispatch fastest."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key))))

    def apply(params: Params, *inputs: Array, **conditions: Array):
        return nnx.merge(graphdef, params)(*inputs, **conditions)

    return Model(init, apply)


def check_precision(what: str, precision: str) -> None:
    """Raise ConfigError, in the name of `what`, for what is none of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ConfigError(f"{what}: precision = {precision!r} is unknown; one of: {', '.join(PRECISIONS)}")


def make(name: str, shape: tuple[int, int, int], num_classes: int, cuts: Sequence[int] = (), **options) -> Model:
    """The model `name` for images of `shape` (h, w, c); the options are the keywords of `models.<name>.make`.

    cuts: the features that losses read one at a time (see `AuxLoss.blocks`).
    """
    return registry.make("models", name, tuple(shape), num_classes, tuple(cuts), **options)
