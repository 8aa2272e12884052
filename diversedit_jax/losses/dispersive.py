"""Dispersive Loss: the features of different examples are pushed apart (arXiv 2506.09027).

An example's features are one vector, its tokens and channels flattened. Four forms: InfoNCE with squared L2 or cosine
distances, hinge, covariance, all functions of the [b b] matrix of scalar products. The functions take features of any
framework and compute in float32 (float64 for float64 input).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax.api import AuxLoss, Term
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses.repa import unit
from diversedit_jax.registry import in_range, one_of

FORMS = ("infonce_l2", "infonce_cosine", "hinge", "covariance")


def products(z: Float[Array, "b p"]) -> Float[Array, "b b"]:
    """The scalar products of all pairs of rows; of the input's precision on every device."""
    return jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)


def squared_distances(z: Float[Array, "b p"]) -> Float[Array, "b b"]:
    """The squared L2 distances of all pairs of rows, exactly 0 on the diagonal.

    From scalar products of the centred rows: what all rows share would otherwise cancel in rounding.
    """
    gram = products(z - z.mean(axis=0))
    squares = jnp.diagonal(gram)
    return jnp.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)


def counted(b: int, diagonal: bool) -> np.ndarray:
    """Which of the [b b] pairs a mean is over: all, or without those of an example and itself."""
    return np.ones((b, b), bool) if diagonal else ~np.eye(b, dtype=bool)


def infonce(distances: Float[Array, "b b"], tau: float, diagonal: bool = True) -> Float[Array, ""]:
    """The log of the mean of exp(-distance / tau) over pairs; at least -ln b with the diagonal."""
    pairs = counted(len(distances), diagonal)
    return jax.nn.logsumexp(-distances / tau, where=pairs) - np.log(pairs.sum()).item()


def hinge(distances: Float[Array, "b b"], margin: float, diagonal: bool = True) -> Float[Array, ""]:
    """The mean of max(0, margin - distance)^2 over pairs."""
    return jnp.mean(jnp.maximum(margin - distances, 0) ** 2, where=counted(len(distances), diagonal))


def covariance(z: Float[Array, "b p"]) -> Float[Array, ""]:
    """The sum of the squared covariances, over examples, of all pairs of different elements.

    The [p p] matrix is not formed: the sum of all its squares is that of the [b b] scalar products.
    """
    centred = z - z.mean(axis=0)
    every = jnp.sum((products(centred) / len(z)) ** 2)
    return every - jnp.sum(jnp.mean(centred**2, axis=0) ** 2)


def dispersive_loss(
    features: Float[Array | np.ndarray, "b ..."],
    form: str = "infonce_l2",
    *,
    tau: float = 0.5,
    margin: float = 1.0,
    diagonal: bool = True,
    per_element: bool = True,
    groups: int = 1,
) -> Float[Array, ""]:
    """The loss of a batch of features; see `make` for the options."""
    one_of("dispersive: form", form, FORMS)
    z = jnp.asarray(features)
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32)).reshape(len(z), -1)
    if groups < 1 or len(z) % groups:
        raise ValueError(f"a batch of {len(z)} cannot be cut into {groups} equal groups")
    least = 1 if diagonal and form != "covariance" else 2
    if len(z) // groups < least:
        raise ValueError(f"dispersive: {len(z)} examples in {groups} groups leave none to compare")
    size = z.shape[1] if per_element else 1

    def loss(z: Float[Array, "b p"]) -> Float[Array, ""]:
        match form:
            case "infonce_l2":
                return infonce(squared_distances(z) / size, tau, diagonal)
            case "infonce_cosine":  # 1 - cosine, as half the squared distance of unit vectors
                return infonce(squared_distances(unit(z)) / 2, tau, diagonal)
            case "hinge":
                return hinge(squared_distances(z) / size, margin, diagonal)
            case "covariance":
                return covariance(unit(z))

    return loss(z) if groups == 1 else jax.vmap(loss)(z.reshape(groups, -1, z.shape[1])).mean()


def make(
    *,
    form: str = "infonce_l2",
    blocks: tuple[int, ...] = (3,),
    coefficient: float = 0.5,
    tau: float = 0.5,
    margin: float = 1.0,
    diagonal: bool = True,
    per_element: bool = True,
    groups: int = 1,
) -> AuxLoss:
    """Dispersive Loss for the trainer, by default with the paper's settings for B.

    form: `infonce_l2`, `infonce_cosine`, `hinge` or `covariance`.
    blocks: whose outputs are dispersed, from 1; the loss is the mean over them. The paper: depth // 4.
    coefficient: of the term. tau: of InfoNCE. margin: of the hinge.
    diagonal: InfoNCE and hinge also count each example with itself, which bounds InfoNCE by -ln b.
    per_element: squared L2 distances are divided by the number of elements, as in the authors' code.
    groups: pairs are those within each of `groups` equal parts of the batch. The published runs took them per device:
        16 examples in JAX (the paper), 32 in PyTorch.

    The authors' PyTorch release differs: coefficient 0.25, tau 1, the last block. The constants of hinge and covariance
    are not published; ours are our choice: a margin of 1, and for the covariance features of length 1, whose
    covariances are means over the examples.
    """
    one_of("dispersive: form", form, FORMS)
    in_range("dispersive: tau", tau, above=0)
    if not blocks:
        raise ConfigError("dispersive: blocks is empty: name at least one")

    def apply(forward, batch, context):
        options = {"tau": tau, "margin": margin, "diagonal": diagonal, "per_element": per_element, "groups": groups}
        loss = sum(dispersive_loss(forward.features[k], form, **options) for k in blocks) / len(blocks)
        return Term(coefficient * loss, {"loss": loss})

    return AuxLoss(apply, blocks=tuple(blocks))
