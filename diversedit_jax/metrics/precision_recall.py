"""Improved precision and recall (arXiv 1904.06991): are samples like the reference, and do they cover it?

A set is the union of balls around its points. The radius of a ball is the distance to the k-th nearest other point.
Precision is the share of samples inside a ball of the reference, recall the share of the reference inside a ball of the
samples. The device works in blocks of pairs, so it never holds a matrix of all distances.

There are two arithmetics. ADM's evaluator, whose numbers papers print, works in float16, which moves values by up to
0.01. Hardware differs in how it accumulates float16. Here sums are accumulated in float32 and rounded once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from diversedit_jax.metrics.checks import check_sets
from diversedit_jax.registry import in_range, one_of


class Block(NamedTuple):
    """Consecutive rows of a set, padded with zeros to b rows, and their squared norms, also rounded to float16."""

    rows: Float32[Array, "b d"]
    norms: Float32[Array, " b"]
    rows16: Float32[Array, "b d"]  # values of float16, held and multiplied as float32: right on every device
    norms16: Float32[Array, " b"]
    valid: Bool[Array, " b"]  # False where padded


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    *,
    k: int = 3,
    distances: str = "exact",
    block: int = 2048,
) -> tuple[float, float]:
    """Precision and recall, each in [0, 1], of features [m d] and [n d].

    distances: `exact` in float32. `float16` rounds features, norms, products and their sums to float16 as ADM's
        evaluator does. A block with a value that is not finite is computed again in float32. ADM's blocks are
        10,000 x 10,000. These are at most block x block, so fewer distances are computed again.
    block: the most rows of a block. Memory holds both sets and a few matrices of block x block.
    """
    one_of("distances", distances, DISTANCES)
    in_range("k", k, 1)
    in_range("block", block, 1)
    sets = [np.asarray(features) for features in (reference, samples)]
    check_sets(k + 1, reference=sets[0], samples=sets[1])
    squared, block = DISTANCES[distances], min(block, max(map(len, sets)))
    reference, samples = (blocks(features, block) for features in sets)
    radii, radii_samples = (squared_radii(parts, k, squared) for parts in (reference, samples))
    covered = [jnp.zeros_like(u.valid) for u in reference]
    realistic = [jnp.zeros_like(v.valid) for v in samples]
    for i, u in enumerate(reference):
        for j, v in enumerate(samples):
            in_samples, in_reference = inside(u, radii[i], v, radii_samples[j], squared=squared)
            covered[i] |= in_samples
            realistic[j] |= in_reference
    precision, recall = np.concatenate(realistic)[: len(sets[1])], np.concatenate(covered)[: len(sets[0])]
    return float(precision.mean()), float(recall.mean())


def blocks(features: np.ndarray, most: int) -> list[Block]:
    """Features [n d] on the device in blocks of one size, at most `most` rows, so that functions compile once."""
    count = -(-len(features) // most)
    size = -(-len(features) // count)

    def block(rows: np.ndarray) -> Block:
        valid = np.arange(size) < len(rows)
        rows = np.pad(rows.astype(np.float32), ((0, size - len(rows)), (0, 0)))
        with np.errstate(over="ignore"):  # float16() looks for inf
            rows16 = rows.astype(np.float16)
            norms16 = np.square(rows16).sum(axis=1, dtype=np.float32).astype(np.float16)
        rounded = rows16.astype(np.float32), norms16.astype(np.float32)
        return jax.device_put(Block(rows, np.square(rows).sum(axis=1), *rounded, valid))

    return [block(features[start : start + size]) for start in range(0, len(features), size)]


def squared_radii(parts: list[Block], k: int, squared) -> list[Float32[Array, " b"]]:
    """The squared distance of each point to the k-th nearest other one. Padding gets -1: an empty ball."""
    radii = []
    for u in parts:
        nearest = jnp.full((len(u.rows), k + 1), jnp.inf)  # one more: each point finds itself
        for v in parts:
            nearest = nearer(nearest, u, v, squared=squared)
        radii.append(jnp.where(u.valid, nearest[:, -1], -1))
    return radii


def exact(u: Block, v: Block) -> Float32[Array, "b c"]:
    """|u|^2 - 2 u.v + |v|^2 of all pairs, in float32; at least 0."""
    product = jnp.einsum("bd,cd->bc", u.rows, v.rows, precision="highest")
    return jnp.maximum(u.norms[:, None] - 2 * product + v.norms, 0)


def float16(u: Block, v: Block) -> Float32[Array, "b c"]:
    """The same with each operation rounded to float16. In float32 if a value of the block is beyond float16."""
    product = jnp.einsum("bd,cd->bc", u.rows16, v.rows16, precision="highest")
    rough = _rounded(_rounded(u.norms16[:, None] - _rounded(2 * product)) + v.norms16)
    # Test before clamping: -inf, from a product beyond the range, is not a distance of 0.
    return jax.lax.cond(jnp.isfinite(rough).all(), lambda: jnp.maximum(rough, 0), lambda: exact(u, v))


DISTANCES = {"exact": exact, "float16": float16}


@partial(jax.jit, static_argnames="squared")
def nearer(nearest: Float32[Array, "b k1"], u: Block, v: Block, *, squared) -> Float32[Array, "b k1"]:
    """The smallest distances of the rows of u, ascending, among those known and those to the rows of v."""
    distances = jnp.where(v.valid, squared(u, v), jnp.inf)
    return -jax.lax.top_k(-jnp.concatenate([nearest, distances], axis=1), nearest.shape[1])[0]


@partial(jax.jit, static_argnames="squared")
def inside(
    u: Block, radii_u: Float32[Array, " b"], v: Block, radii_v: Float32[Array, " c"], *, squared
) -> tuple[Bool[Array, " b"], Bool[Array, " c"]]:
    """Which rows of u lie inside a ball of v, and which rows of v inside a ball of u."""
    distances = squared(u, v)
    return (distances <= radii_v).any(axis=1), (distances <= radii_u[:, None]).any(axis=0)


def _rounded(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """float32 rounded to float16. The compiler might remove a pair of conversions."""
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
