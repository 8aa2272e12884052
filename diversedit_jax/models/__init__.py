"""Networks in Flax NNX, one file each. The rest of the package sees a network as functions of its parameters."""

from collections.abc import Callable, Mapping, Sequence

from flax import nnx
from jaxtyping import Array

from diversedit_jax import registry
from diversedit_jax.api import Model, Params, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion

PRECISIONS = ("highest", "high", "default")  # of matrix products, named as in jax; on a CPU all of them are float32


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """The module that `build` makes, as pure functions. jit then sees plain dicts, which dispatch fastest."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key))))

    def apply(params: Params, *arrays: Array, **inputs: Array):
        return nnx.merge(graphdef, params)(*arrays, **inputs)

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
