"""How alike the blocks of a network are, and how rich each is: the CKA family, cosines, ranks, scores of diversity.

A representation is a matrix of n examples, `rows` [n p]. The caller chooses what an example is: a token, an image's
mean token, or a whole image. DiverseDiT's analysis (arXiv 2603.04239, section 3.2) compares all blocks of a network at
one time by centred kernel alignment (CKA, Kornblith et al., arXiv 1905.00414):

    similar = cka([rows_of_block_1, rows_of_block_2, ...], kernel=rbf)      # [l l], 1 on the diagonal
    diversity(similar)                                                      # {"all": .., "adjacent": .., ...}

For more data than memory: HSIC is additive over batches. `normalised` of a sum of `hsic_of(batch, hsic=hsic_unbiased)`
is minibatch CKA (Nguyen et al., arXiv 2010.15327). On average it does not depend on the batch size. Covariances, norms
and cosines are sums too.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diversedit_jax.arrays import portable
from diversedit_jax.registry import in_range
from diversedit_jax.shapes import Array, Float

Rows = Float[Array, "n p"]
Examples = Float[Array, "n _"]  # representations of the same examples may differ in width
Representations = Sequence[Examples] | Float[Array, "l n p"]  # of l blocks
Gram = Float[Array, "n n"]
Similarity = Float[Array, "l m"]
Kernel = Callable[[Rows], Gram]  # how alike every two examples are


@portable
def inner(rows: Rows) -> Gram:
    """<u, v>."""
    return jnp.einsum("np,mp->nm", rows, rows, precision="highest")


@portable
def linear(rows: Rows) -> Gram:
    """k(u, v) = <u - m, v - m> with the mean example m. HSIC is that of <u, v>, but float32 loses less."""
    return inner(rows - rows.mean(axis=0, keepdims=True))


@portable
def polynomial(rows: Rows, degree: int = 3) -> Gram:
    """k(u, v) = (<u, v> / p + 1)^degree."""
    return (inner(rows) / rows.shape[1] + 1) ** degree


@portable
def rbf(rows: Rows, multiplier: float = 1.0) -> Gram:
    """k(u, v) = exp(-|u - v|^2 / (2 s^2)), where s is `multiplier` times the median distance of two examples."""
    products = linear(rows)
    norms = jnp.diagonal(products)
    squared = jnp.maximum(norms[:, None] + norms[None] - 2 * products, 0)
    above = np.triu_indices(len(rows), 1)
    scale = multiplier * jnp.median(jnp.sqrt(squared[above]))
    return jnp.exp(-squared / (2 * scale**2))


KERNELS = {"linear": linear, "polynomial": polynomial, "rbf": rbf}

# The Hilbert-Schmidt independence criterion (HSIC) of every two of two sets of Gram matrices of the same n examples.


@portable
def hsic_biased(k: Float[Array, "l n n"], m: Float[Array, "m n n"]) -> Similarity:
    """The biased estimator Tr(K H M H) / (n - 1)^2 (Gretton et al., 2005)."""
    return _traces(_centred(k), m) / (k.shape[1] - 1) ** 2


@portable
def hsic_unbiased(k: Float[Array, "l n n"], m: Float[Array, "m n n"]) -> Similarity:
    """The unbiased estimator of Song et al. (JMLR 2012, Eq. 5), n >= 4. Its CKA may exceed 1 a little.

    For unrelated representations it is 0 on average.
    """
    # Centring changes only the rounding: what all examples share would be most of the sums.
    return _unbiased(_centred(k), _centred(m))


def _unbiased(k: Float[Array, "l n n"], m: Float[Array, "m n n"]) -> Similarity:
    """Eq. 5 as it stands, also for matrices that are not symmetric."""
    n = in_range("examples of the unbiased estimator of HSIC", k.shape[1], 4)
    k, m = (g * (1 - np.eye(n, dtype=g.dtype)) for g in (k, m))
    sums = k.sum(axis=(1, 2))[:, None] * m.sum(axis=(1, 2))[None]
    rows = jnp.einsum("ln,mn->lm", k.sum(axis=1), m.sum(axis=2), precision="highest")
    return (_traces(k, m) + sums / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def _centred(grams: Float[Array, "l n n"]) -> Float[Array, "l n n"]:
    """H K H with H = I - 1/n."""
    grams = grams - grams.mean(axis=1, keepdims=True)
    return grams - grams.mean(axis=2, keepdims=True)


def _traces(k: Float[Array, "l n n"], m: Float[Array, "m n n"]) -> Similarity:
    """Tr(K_i M_j)."""
    return jnp.einsum("lab,mba->lm", k, m, precision="highest")


HSICS = {"biased": hsic_biased, "unbiased": hsic_unbiased}


@portable
def hsic_of(representations: Representations, kernel: Kernel = linear, hsic: Callable = hsic_biased) -> Similarity:
    """HSIC of every two of l representations of the same examples, [l l]. Needs memory for 2 l Gram matrices."""
    one_array = isinstance(representations, Array)
    grams = jax.vmap(kernel)(representations) if one_array else jnp.stack([kernel(rows) for rows in representations])
    found = hsic(grams, grams)
    return (found + found.T) / 2  # symmetric to the last bit


@portable
def normalised(hsic: Float[Array, "l l"]) -> Float[Array, "l l"]:
    """HSIC_ij / sqrt(HSIC_ii HSIC_jj): 1 on the diagonal. NaN where a representation does not vary."""
    own = jnp.sqrt(jnp.diagonal(hsic))
    return hsic / (own[:, None] * own[None])


@portable
def cka(representations: Representations, kernel: Kernel = linear, hsic: Callable = hsic_biased) -> Float[Array, "l l"]:
    """Centred kernel alignment of every two of l representations of the same n examples, in l^2 n^2 work.

    It is 1 for representations that are equal up to rotation and scale (with `linear` and `rbf`).
    """
    return normalised(hsic_of(representations, kernel, hsic))


@portable
def cknna(representations: Representations, nearest: int = 10, unbiased: bool = True) -> Float[Array, "l l"]:
    """Centred kernel nearest-neighbour alignment (Huh et al., arXiv 2405.07987, section 2).

    CKA of linear kernels. For each example they keep only the neighbours that are among the `nearest` in both
    representations. As in the authors' code, an example is its own neighbour in the biased estimator only. The authors
    normalise rows to unit length first.
    """
    n = len(representations[0])
    in_range(f"nearest neighbours of {n} examples", nearest, 2, n - 1)
    grams = jnp.stack([inner(rows) for rows in representations])
    ranked = jnp.where(np.eye(n, dtype=bool), -jnp.inf, grams) if unbiased else grams
    _, found = jax.lax.top_k(ranked, nearest)
    near = jnp.zeros_like(grams).at[jnp.arange(len(grams))[:, None, None], jnp.arange(n)[None, :, None], found].set(1)
    hsic = _unbiased if unbiased else hsic_biased  # masks are not symmetric

    def row(one: tuple[Array, Array]) -> Array:  # of block i; each pair has its own mask
        def pair(other: tuple[Array, Array]) -> Array:
            masks = one[1] * other[1]
            return hsic((masks * one[0])[None], (masks * other[0])[None])[0, 0]

        return jax.lax.map(pair, (grams, near))  # one pair at a time, for less memory

    return normalised(jax.lax.map(row, (grams, near)))


@portable
def procrustes(representations: Representations) -> Float[Array, "l l"]:
    """|X^T Y|_* / (|X|_F |Y|_F) of centred X and Y, in [0, 1]: 1 if a rotation and a scale turn one into the other.

    It is 1 minus half the squared Procrustes distance (Ding et al., arXiv 2108.01661). It computes the singular values
    of l^2 / 2 matrices [p p].
    """
    centred = [rows - rows.mean(axis=0, keepdims=True) for rows in representations]
    units = [rows / jnp.linalg.norm(rows) for rows in centred]
    found = jnp.eye(len(units), dtype=units[0].dtype)
    for i, j in zip(*np.triu_indices(len(units), 1), strict=True):
        cross = jnp.einsum("np,nq->pq", units[i], units[j], precision="highest")
        found = found.at[[i, j], [j, i]].set(jnp.linalg.svd(cross, compute_uv=False).sum())
    return found


@portable
def token_cosine(features: Float[Array, "l b n d"]) -> Float[Array, "l l"]:
    """The mean over tokens of the cosine between two blocks' features of the same token."""
    units = _unit(features)
    tokens = features.shape[1] * features.shape[2]
    return jnp.einsum("lbnd,mbnd->lm", units, units, precision="highest") / tokens


@portable
def mean_cosine(features: Float[Array, "l b n d"]) -> Float[Array, "l l"]:
    """The mean over images of the cosine between two blocks' mean tokens of the same image."""
    units = _unit(features.mean(axis=2))
    return jnp.einsum("lbd,mbd->lm", units, units, precision="highest") / features.shape[1]


@portable
def centred_cosine(features: Float[Array, "l b n d"]) -> Float[Array, "l l"]:
    """`token_cosine` of features minus the mean token of their block: without what all tokens share."""
    return token_cosine(features - features.mean(axis=(1, 2), keepdims=True))


@portable
def mean_share(features: Float[Array, "l b n d"]) -> Float[Array, " l"]:
    """The share of each block's mean token in the energy of the block: |mean f|^2 / mean |f|^2, in [0, 1]."""
    mean = features.mean(axis=(1, 2))
    return jnp.sum(mean**2, axis=-1) / jnp.mean(jnp.sum(features**2, axis=-1), axis=(1, 2))


def _unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# How rich one block is: measures of the covariance of its features, [.. d d].


@portable
def effective_rank(covariance: Float[Array, "*l d d"]) -> Float[Array, "*l"]:
    """exp of the entropy of the normalised singular values of the centred features, in [1, d] (Roy and Vetterli, 2007).

    The singular values are the square roots of the eigenvalues of the covariance.
    """
    values = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(covariance), 0))
    shares = values / values.sum(axis=-1, keepdims=True)
    return jnp.exp(-jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0), axis=-1))


@portable
def participation_ratio(covariance: Float[Array, "*l d d"]) -> Float[Array, "*l"]:
    """How many directions share the variance: (sum lambda)^2 / sum lambda^2 of the eigenvalues, in [1, d] (Gao et al.,
    bioRxiv 214262)."""
    trace = jnp.trace(covariance, axis1=-2, axis2=-1)
    return trace**2 / jnp.sum(covariance**2, axis=(-2, -1))


@portable
def channel_usage(covariance: Float[Array, "*l d d"]) -> Float[Array, "*l d"]:
    """The share of each channel in the variance of its block. The shares of a block add up to 1."""
    variances = jnp.diagonal(covariance, axis1=-2, axis2=-1)
    return variances / variances.sum(axis=-1, keepdims=True)


@portable
def channels_used(usage: Float[Array, "*l d"]) -> Float[Array, "*l"]:
    """1 / sum of squared shares: between 1 (one channel varies) and d (all vary alike)."""
    return 1 / jnp.sum(usage**2, axis=-1)


@portable
def off_diagonal_mean(similarity: Float[Array, "l l"]) -> Float[Array, ""]:
    """The mean similarity of two different blocks. It is lower for a more diverse network."""
    return similarity[~np.eye(len(similarity), dtype=bool)].mean()


# (i, j, number of blocks) -> the weight of a pair of blocks i < j in a score of diversity
DIVERSITIES = {
    "all": lambda i, j, blocks: np.ones_like(i, float),
    "adjacent": lambda i, j, blocks: (j == i + 1).astype(float),
    "mirrored": lambda i, j, blocks: (i + j == blocks - 1).astype(float),
    "distant": lambda i, j, blocks: (j - i).astype(float),
}


@portable
def diversity(similarity: Float[Array, "l l"]) -> dict[str, Float[Array, ""]]:
    """Scores of diversity: weighted means of 1 - similarity over pairs of different blocks, by name.

    all: every pair alike. adjacent: each block and the next. mirrored: block i and block L - 1 - i, which a long
    residual connection joins. distant: every pair, weighted by the distance of the two blocks.
    """
    i, j = np.triu_indices(in_range("number of blocks", len(similarity), 2), 1)
    apart = 1 - similarity[i, j]
    weights = {name: weigh(i, j, len(similarity)) for name, weigh in DIVERSITIES.items()}
    return {name: jnp.sum(apart * w.astype(apart.dtype)) / w.sum() for name, w in weights.items()}
