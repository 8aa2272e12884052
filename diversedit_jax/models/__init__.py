"""Networks in Flax NNX, one file each. The rest of the package sees a network as functions of its parameters."""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from diversedit_jax import registry
from diversedit_jax.api import Model, Params, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion

PRECISIONS = ("highest", "high", "default")  # of matrix products, named as in jax; on a CPU all of them are float32


class Keys:
    """Draws the keys that `nnx.Rngs(key)` draws, for the layers of nnx, which take it as their `rngs`.

    An nnx.Rngs counts its draws in a Variable. In traced code each of them then costs a text about all the code traced
    so far: seconds for a deep network.
    """

    def __init__(self, key: Array):
        self._key, self._count = key, count()

    def params(self) -> Array:
        return jax.random.fold_in(self._key, next(self._count))


def functional(build: Callable[[Keys], nnx.Module]) -> Model:
    """The module that `build` makes, as pure functions. jit then sees plain dicts, which dispatch fastest."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(Keys(jax.random.key(0)))))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(Keys(key))))

    def apply(params: Params, *given: Any, **inputs: Array):
        return nnx.merge(graphdef, params)(*given, **inputs)

    return Model(init, apply)


def check_inputs(model: str, inputs: Mapping[str, tuple[int, ...]], known: Sequence[str]) -> None:
    """Raise ConfigError if the objective needs an input (`Objective.inputs`) that this model does not take."""
    for name in inputs:
        if name not in known:
            raise ConfigError(
                f"the objective needs a network with the input {name!r}; model {model}: {suggestion(name, known)}"
            )


def make(
    name: str,
    space: Space,
    inputs: Mapping[str, tuple[int, ...]] | None = None,
    read_blocks: Sequence[int] = (),
    **options,
) -> Model:
    """The model `name` for examples of `space`. The options are the keywords of `models.<name>.make`.

    inputs:      what the network takes besides x_t, t and y (`Objective.inputs`).
    read_blocks: blocks whose features losses read one at a time (`AuxLoss.blocks`).
    """
    return registry.make("models", name, space, dict(inputs or {}), tuple(read_blocks), **options)
