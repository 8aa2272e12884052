"""How alike the representations of two blocks are: centred kernel alignment (CKA, Kornblith et al., arXiv 1905.00414).

A representation is a matrix of n examples, `rows` [n p]; what one example is, a token or a whole image, is the caller's
choice. DiverseDiT's analysis (arXiv 2603.04239, section 3.2) compares all blocks of a network at one time in this way.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Rows = Float[Array, "n p"]
Gram = Float[Array, "n n"]
Kernel = Callable[[Rows], Gram]


def linear(rows: Rows) -> Gram:
    """k(u, v) = <u, v>."""
    return jnp.einsum("np,mp->nm", rows, rows, precision="highest")


def polynomial(rows: Rows, degree: int = 3) -> Gram:
    """k(u, v) = (<u, v> / p + 1)^degree."""
    return (linear(rows) / rows.shape[1] + 1) ** degree


def rbf(rows: Rows, multiplier: float = 1.0) -> Gram:
    """k(u, v) = exp(-|u - v|^2 / (2 s^2)), where s is `multiplier` times the median distance of two examples."""
    inner = linear(rows - rows.mean(axis=0))
    norms = jnp.diagonal(inner)
    squared = jnp.maximum(norms[:, None] + norms[None] - 2 * inner, 0)
    above = np.triu_indices(len(rows), 1)
    scale = multiplier * jnp.median(jnp.sqrt(squared[above]))
    return jnp.exp(-squared / (2 * scale**2))


KERNELS = {"linear": linear, "polynomial": polynomial, "rbf": rbf}


def hsic_biased(k: Gram, m: Gram) -> Float[Array, ""]:
    """The biased estimator Tr(K H M H) / (n - 1)^2 of the Hilbert-Schmidt independence criterion (Gretton, 2005)."""
    return jnp.sum(_centred(k) * m) / (len(k) - 1) ** 2


def hsic_unbiased(k: Gram, m: Gram) -> Float[Array, ""]:
    """The unbiased estimator of Song et al. (JMLR 2012, Eq. 5), n >= 4: 0 on average for what is unrelated."""
    n = len(k)
    if n < 4:
        raise ValueError(f"the unbiased estimator of HSIC needs at least 4 examples, given {n}")
    k, m = (g - jnp.diag(jnp.diagonal(g)) for g in (k, m))
    rows = jnp.vdot(k.sum(axis=0), m.sum(axis=0))
    return (jnp.sum(k * m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


HSICS = {"biased": hsic_biased, "unbiased": hsic_unbiased}


def cka(
    representations: Sequence[Rows], kernel: Kernel = linear, hsic: Callable[[Gram, Gram], Array] = hsic_biased
) -> Float[Array, "l l"]:
    """HSIC(K_i, K_j) / sqrt(HSIC(K_i, K_i) HSIC(K_j, K_j)) of every two of l representations of the same n examples.

    1 for representations that are equal up to rotation and scale (with `linear` and `rbf`). Takes l^2 n^2 work and the
    memory of l Gram matrices.
    """
    grams = [kernel(rows) for rows in representations]
    pairs = jnp.stack([jnp.stack([hsic(k, m) for m in grams]) for k in grams])
    own = jnp.sqrt(jnp.diagonal(pairs))
    return pairs / (own[:, None] * own[None])


def off_diagonal_mean(similarity: Float[Array, "l l"]) -> Float[Array, ""]:
    """The mean similarity of two different blocks: the lower, the more diverse the network."""
    off = ~np.eye(len(similarity), dtype=bool)
    return similarity[off].mean()


def _centred(gram: Gram) -> Gram:
    """H K H with H = I - 1/n."""
    gram = gram - gram.mean(axis=0)
    return gram - gram.mean(axis=1, keepdims=True)
