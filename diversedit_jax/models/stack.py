"""A stack of blocks, run as one loop over stacked parameters or as one block after another.

The parameters of all blocks are one tree. Its arrays have a leading layer axis.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from diversedit_jax.models import Keys


class Stack(NamedTuple):
    """How a stack runs.

    read_blocks: blocks, counted from 1, whose outputs losses read. A loop is split behind each of them, so that reading
                 one output does not keep all outputs in memory.
    policy:      what the backward pass keeps, for `jax.checkpoint`; None: everything.
    unroll:      one block after another instead of a loop.
    kinds:       blocks of so many kinds alternate. A layer then holds one of each kind, and its output is a tuple.
    """

    read_blocks: tuple[int, ...]
    policy: Callable | None
    unroll: bool
    kinds: int = 1

    def run(
        self, body: Callable, x: Any, layers: tuple, first: int, separate: bool = False
    ) -> tuple[Any, list[Any], Any]:
        """Apply `body`, (x, layer) -> (x, output), to all layers in turn, as `jax.lax.scan` does.

        x, output: arrays, or trees of them.
        layers:   trees with a leading layer axis, or lists of layers.
        first:    how many blocks come before them.
        separate: the output of a block is not its x.
        Returns the last x, the output of each block, and all outputs stacked (with `unroll` as a list).
        """
        count = len(layers[0]) if isinstance(layers[0], list) else len(jax.tree.leaves(layers[0])[0])
        if not self.unroll:
            return self._loop(body, x, layers, range(first, first + count * self.kinds), separate)
        step = body if self.policy is None else jax.checkpoint(body, policy=self.policy)
        outputs = []
        for layer in zip(*map(each, layers), strict=True):
            x, output = step(x, layer)
            outputs.append(output)
        return x, self._blocks(outputs), outputs

    def _blocks(self, outputs: list[Any]) -> list[Any]:
        """The output of each block, from that of each layer."""
        return outputs if self.kinds == 1 else [output for of_layer in outputs for output in of_layer]

    def _loop(self, body: Callable, x: Any, layers: tuple, blocks: range, separate: bool):
        """`run` as a scan that is split behind `read_blocks`."""
        separate = separate or self.kinds > 1

        def with_output(carry: tuple[Any, ...], layer: tuple):
            x, output = body(carry[0], layer)
            return ((x, output) if separate else (x,)), output

        read = [k - blocks.start for k in self.read_blocks if blocks.start < k <= blocks.stop - self.kinds]
        ends = sorted({math.ceil(k / self.kinds) for k in read})
        carry = (x, x if self.kinds == 1 else (x,) * self.kinds) if separate else (x,)
        outputs, stacks = [], []
        for begin, end in pairwise([0, *ends, len(blocks) // self.kinds]):
            step = with_output
            if self.policy is not None:  # XLA inlines a loop of one turn, and would then merge the recomputation
                step = jax.checkpoint(with_output, policy=self.policy, prevent_cse=end - begin == 1)
            carry, stack = jax.lax.scan(step, carry, part(layers, begin, end))
            outputs += each(stack)
            outputs[-1] = carry[-1]  # the same array, but reading it keeps no stack in memory
            stacks.append(stack)
        return (
            carry[0],
            self._blocks(outputs),
            jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks) if stacks[1:] else stacks[0],
        )

    def reverse(self, stack: Any, outputs: list[Any]) -> tuple[Any, list[Any]]:
        """The outputs of the layers in reverse order, as layers of another `run`; and those of the blocks in order.

        A loop keeps the reversed stack for its backward pass anyway. Outputs outside of `read_blocks` are read from it.
        """
        if self.unroll:
            return stack[::-1], outputs
        flipped = jax.tree.map(lambda leaf: jnp.flip(leaf, axis=0), stack)
        copies = zip(outputs, self._blocks(each(flipped)[::-1]), strict=True)
        return flipped, [own if k in self.read_blocks else copy for k, (own, copy) in enumerate(copies, 1)]


def stacked(build: Callable[[Keys], nnx.Module], count: int, rngs: Keys) -> nnx.Module:
    """`count` modules as one, whose arrays have a leading layer axis."""
    return jax.vmap(lambda key: build(Keys(key)))(jax.random.split(rngs.params(), count))


def part(layers: Any, begin: int, end: int | None = None) -> Any:
    """Layers begin .. end - 1 of stacked layers, or of a list of layers."""
    if isinstance(layers, list):
        return layers[begin:end]
    return jax.tree.map(lambda p: p if (begin, end) in ((0, None), (0, len(p))) else p[begin:end], layers)


def each(layers: Any) -> list:
    """The layers of a stack, one by one. A list of layers stays as it is."""
    if isinstance(layers, list):
        return layers
    leaves, structure = jax.tree.flatten(layers)
    return [structure.unflatten(layer) for layer in zip(*map(unstack, leaves), strict=True)]


def unstack(stack: Float[Array, "l ..."]) -> list[Float[Array, "..."]]:
    """The arrays of a stack, in one operation. Its gradient is one concatenation."""
    return [layer[0] for layer in jax.lax.split(stack, (1,) * len(stack), axis=0)]
