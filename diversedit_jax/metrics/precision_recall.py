"""Improved precision and recall (arXiv 1904.06991): are samples like the reference, and do they cover it?

A set is thought of as the union of balls around its points; the radius of each ball is the distance to the k-th nearest
other point. Precision is the share of samples inside of some ball of the reference, recall the share of the reference
inside of some ball of the samples. Runs on the device in blocks of pairs, so no matrix of all distances is ever held.

There are two arithmetics. ADM's evaluator, whose numbers papers print, works in float16, which moves values by up to
0.01. Even that is not one number, for hardware differs in how it accumulates; here sums are accumulated in float32 and
rounded once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from diversedit_jax.metrics.checks import check_sets


class Block(NamedTuple):
    """Consecutive rows of a set, padded with zeros to b rows, and their squared norms; both also rounded to float16."""

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

    distances: "exact" in float32; "float16" rounds features, norms, products and their sums to float16 as ADM's
    evaluator does, and computes again in float32 a block with a value that is not finite. ADM's blocks are
    10,000 x 10,000, these at most block x block, so beyond the range of float16 fewer distances are computed again.
    block: the most rows of a block; needs memory for a few matrices of block x block beside both sets.
    Raises ValueError for sets of fewer than k + 1 points, dimensions that differ, values that are not finite, k < 1,
    block < 1 or an unknown name.
    """
    if distances not in DISTANCES:
        raise ValueError(f"distances must be one of {', '.join(DISTANCES)}, given {distances}")
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be at least 1, given {k} and {block}")
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
    return share(realistic, len(sets[1])), share(covered, len(sets[0]))


def blocks(features: np.ndarray, most: int) -> list[Block]:
    """Features [n d] on the device in blocks of one size, at most `most` rows: the functions below compile once."""
    count = -(-len(features) // most)
    size = -(-len(features) // count)
    return [_block(features[start : start + size], size) for start in range(0, len(features), size)]


def squared_radii(parts: list[Block], k: int, squared) -> list[Float32[Array, " b"]]:
    """The squared distance of each point to the k-th nearest other one; -1, which holds nothing, where padded."""
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
    """The same with each operation rounded to float16; in float32 if a value of the block is beyond its range."""
    product = jnp.einsum("bd,cd->bc", u.rows16, v.rows16, precision="highest")
    rough = _rounded(_rounded(u.norms16[:, None] - _rounded(2 * product)) + v.norms16)
    # Before they are clamped: -inf, from a product beyond the range, is not a distance of 0.
    return jax.lax.cond(jnp.isfinite(rough).all(), lambda: jnp.maximum(rough, 0), lambda: exact(u, v))


DISTANCES = {"exact": exact, "float16": float16}


@partial(jax.jit, static_argnames="squared")
def nearer(nearest: Float32[Array, "b k1"], u: Block, v: Block, *, squared) -> Float32[Array, "b k1"]:
    """The smallest distances of the rows of u, ascending: those known and those to the rows of v."""
    distances = jnp.where(v.valid, squared(u, v), jnp.inf)
    return -jax.lax.top_k(-jnp.concatenate([nearest, distances], axis=1), nearest.shape[1])[0]


@partial(jax.jit, static_argnames="squared")
def inside(
    u: Block, radii_u: Float32[Array, " b"], v: Block, radii_v: Float32[Array, " c"], *, squared
) -> tuple[Bool[Array, " b"], Bool[Array, " c"]]:
    """Which rows of u lie inside of some ball of v, and which of v in one of u."""
    distances = squared(u, v)
    return (distances <= radii_v).any(axis=1), (distances <= radii_u[:, None]).any(axis=0)


def share(found: list[Bool[Array, " b"]], n: int) -> float:
    """The share of True among the first n."""
    return float(np.concatenate(found)[:n].mean())


def _block(rows: np.ndarray, size: int) -> Block:
    valid = np.arange(size) < len(rows)
    rows = np.pad(rows.astype(np.float32), ((0, size - len(rows)), (0, 0)))
    with np.errstate(over="ignore"):  # inf is what float16() looks for
        rows16 = rows.astype(np.float16)
        norms16 = np.square(rows16).sum(axis=1, dtype=np.float32).astype(np.float16)
    rounded = rows16.astype(np.float32), norms16.astype(np.float32)
    return jax.device_put(Block(rows, np.square(rows).sum(axis=1), *rounded, valid))


def _rounded(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """float32 rounded to float16; a pair of conversions might be optimised away."""
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
