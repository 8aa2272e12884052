"""A stack of blocks, run as one loop over their stacked parameters or as one block after another.

The parameters of all blocks are one tree, whose arrays have a leading layer axis. `Stack.run` applies a body to each
layer in turn, as `jax.lax.scan` does.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Stack(NamedTuple):
    """How a stack runs.

    cuts:   blocks, counted from 1, after which a loop is split. Their outputs can be read without keeping all outputs.
    policy: what the backward pass keeps, for `jax.checkpoint`; None: everything.
    unroll: one block after another instead of a loop.
    """

    cuts: tuple[int, ...]
    policy: Callable | None
    unroll: bool

    def run(self, body: Callable, carry: Any, layers: tuple, first: int) -> tuple[Any, list[Array], Any]:
        """Apply `body` (carry, layer) -> (carry, output) to all layers.

        layers: trees with a leading layer axis, or lists of layers. first: how many blocks come before them.
        Returns the last carry, the output of each block, and all outputs stacked; with `unroll` a list instead.
        """
        count = len(layers[0]) if isinstance(layers[0], list) else len(jax.tree.leaves(layers[0])[0])
        if not self.unroll:
            return self._loop(body, carry, layers, range(first, first + count))
        step = body if self.policy is None else jax.checkpoint(body, policy=self.policy)
        outputs = []
        for layer in zip(*map(each, layers), strict=True):
            carry, output = step(carry, layer)
            outputs.append(output)
        return carry, outputs, outputs

    def _loop(self, body: Callable, carry: Any, layers: tuple, blocks: range) -> tuple[Any, list[Array], Array]:
        """`run` as a scan, split after the blocks in `cuts`.

        The output of such a block is the carry, or its last part: reading it keeps no stack in memory.
        """
        ends = [k - blocks.start for k in self.cuts if blocks.start < k < blocks.stop]
        outputs, stacks = [], []
        for begin, end in pairwise([0, *ends, len(blocks)]):
            step = body
            if self.policy is not None:  # XLA inlines a loop of one turn, and would then merge what is computed twice
                step = jax.checkpoint(body, policy=self.policy, prevent_cse=end - begin == 1)
            carry, emitted = jax.lax.scan(step, carry, part(layers, begin, end))
            outputs += unstack(emitted)
            outputs[-1] = jax.tree.leaves(carry)[-1]
            stacks.append(emitted)
        return carry, outputs, stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)


def stacked(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one, each of its arrays with a leading layer axis."""
    return jax.vmap(lambda key: build(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def part(layers: Any, begin: int, end: int | None = None) -> Any:
    """Layers begin .. end - 1 of stacked layers."""
    return jax.tree.map(lambda p: p if (begin, end) in ((0, None), (0, len(p))) else p[begin:end], layers)


def each(layers: Any) -> list:
    """The layers of a stack, one by one; a list of layers as it is."""
    if isinstance(layers, list):
        return layers
    leaves, structure = jax.tree.flatten(layers)
    return [structure.unflatten(layer) for layer in zip(*map(unstack, leaves), strict=True)]


def unstack(stack: Float[Array, "l ..."]) -> list[Float[Array, "..."]]:
    """The arrays of a stack, in one operation whose gradient is one concatenation."""
    return [layer[0] for layer in jax.lax.split(stack, (1,) * len(stack), axis=0)]
