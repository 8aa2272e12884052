"""Dispersive Loss: push the features of different examples apart (arXiv 2506.09027).

The features of an example are one vector: its tokens and channels, flattened. There are four forms: InfoNCE with
squared L2 or cosine distances, hinge, and covariance. All are functions of the [b b] matrix of scalar products. The
functions take arrays of any framework (`arrays.portable`) and compute in float32 (float64 for float64 input).
"""

import jax
import jax.numpy as jnp
import numpy as np

from diversedit_jax.api import AuxLoss, Term
from diversedit_jax.arrays import portable
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses._shared import in_groups, unit, wide
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.shapes import Array, Bool, Float

FORMS = ("infonce_l2", "infonce_cosine", "hinge", "covariance")


def products(z: Float[Array, "b p"]) -> Float[Array, "b b"]:
    """The scalar products of all pairs of rows, in the precision of the input on every device."""
    return jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)


def squared_distances(z: Float[Array, "b p"]) -> Float[Array, "b b"]:
    """The squared L2 distances of all pairs of rows, exactly 0 on the diagonal.

    The rows are centred first: otherwise what they share would cancel in rounding.
    """
    gram = products(z - z.mean(axis=0, keepdims=True))
    squares = jnp.diagonal(gram)
    return jnp.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)


def infonce(distances: Float[Array, "b b"], pairs: Bool[np.ndarray, "b b"], tau: float) -> Float[Array, ""]:
    """The log of the mean of exp(-distance / tau) over these pairs."""
    return jax.nn.logsumexp(-distances / tau, where=pairs) - np.log(pairs.sum()).item()


def covariance(z: Float[Array, "b p"]) -> Float[Array, ""]:
    """The sum over all pairs of different elements of their squared covariance over the examples.

    The [p p] matrix is not formed: its squares have the same sum as the squares of the [b b] scalar products.
    """
    centred = z - z.mean(axis=0, keepdims=True)
    every = jnp.sum((products(centred) / len(z)) ** 2)
    return every - jnp.sum(jnp.mean(centred**2, axis=0) ** 2)


@portable
def dispersive_loss(
    features: Float[Array, "b ..."],
    form: str = "infonce_l2",
    *,
    tau: float = 0.5,
    margin: float = 1.0,
    diagonal: bool = True,
    per_element: bool = True,
    groups: int = 1,
) -> Float[Array, ""]:
    """The loss of a batch of features. The options are those of `make`."""
    one_of("dispersive: form", form, FORMS)
    z = wide(features)
    z = z.reshape(len(z), -1)
    z = z if groups == 1 else in_groups(z, groups)
    b, p = z.shape[-2:]
    in_range("dispersive: examples in a group", b, 1 if diagonal and form != "covariance" else 2)
    pairs = np.ones((b, b), bool) if diagonal else ~np.eye(b, dtype=bool)
    size = p if per_element else 1

    def loss(z: Float[Array, "b p"]) -> Float[Array, ""]:
        match form:
            case "infonce_l2":
                return infonce(squared_distances(z) / size, pairs, tau)
            case "infonce_cosine":  # 1 - cosine is half the squared distance of unit vectors
                return infonce(squared_distances(unit(z)) / 2, pairs, tau)
            case "hinge":
                return jnp.mean(jnp.maximum(margin - squared_distances(z) / size, 0) ** 2, where=pairs)
            case "covariance":
                return covariance(unit(z))

    return loss(z) if groups == 1 else jax.vmap(loss)(z).mean()


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

    form: one of FORMS.
    blocks: their outputs are dispersed, from 1. The loss is the mean over them. The paper takes depth // 4.
    coefficient: of the term. tau: of InfoNCE. margin: of the hinge.
    diagonal: InfoNCE and hinge also count each example with itself. InfoNCE is then at least -ln b.
    per_element: divide squared L2 distances by the number of elements, as the authors' code does.
    groups: compare examples within each of so many equal parts of the batch. The published runs compared them per
        device: 16 examples in JAX (the paper), 32 in PyTorch.

    The authors' PyTorch release differs: coefficient 0.25, tau 1, the last block. They did not publish the constants of
    hinge and covariance. Our choice is a margin of 1, and for the covariance features of length 1 and means over the
    examples.
    """
    one_of("dispersive: form", form, FORMS)
    in_range("dispersive: tau", tau, above=0)
    in_range("dispersive: margin", margin, 0)
    in_range("dispersive: groups", groups, 1)
    for block in blocks:
        in_range("dispersive: blocks", block, 0)
    if not blocks:
        raise ConfigError("dispersive: blocks = () must name at least one block")

    def apply(forward, batch, context):
        options = {"tau": tau, "margin": margin, "diagonal": diagonal, "per_element": per_element, "groups": groups}
        loss = sum(dispersive_loss(forward.features[k], form, **options) for k in blocks) / len(blocks)
        return Term(coefficient * loss, {"loss": loss})

    return AuxLoss(apply, blocks=tuple(blocks))
