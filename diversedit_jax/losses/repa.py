"""Representation alignment: a block's features, through a projector, against a frozen encoder's (REPA, arXiv
2410.06940).

The batch has the targets: `features/<encoder>` [b n k], one for each token of the network. For REG (arXiv 2507.01467)
it also has `token/<encoder>` [b k], the class token. Frozen encoders put them there (`config.encoders`), or the data.
The functions take arrays of any framework (`arrays.portable`) and compute in float32 (float64 for float64 input).
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diversedit_jax.api import AuxLoss, Batch, Params, Term
from diversedit_jax.arrays import portable
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses._shared import DTYPES, head, init_head, unit
from diversedit_jax.registry import MANY, in_range, one_of
from diversedit_jax.shapes import Array, Float, PRNGKeyArray

SIMILARITIES = ("cosine", "nt_xent")


def init_projector(key: PRNGKeyArray, d: int, width: int, k: int) -> Params:
    """The parameters of the projector d -> width -> width -> k. `project` applies it."""
    return init_head(key, (d, width, width, k))


@portable
def project(params: Params, x: Float[Array, "*b d"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*b k"]:
    """The output of the projector in float32. Matmuls are in `dtype`."""
    return head(params, x, dtype)


@portable
def repa_loss(
    z: Float[Array, "b n k"], targets: Float[Array, "..."], similarity: str = "cosine", tau: float = 0.1
) -> Float[Array, " b"]:
    """How far the projected tokens of each example are from their targets; the mean over tokens.

    targets: [b n k], as z. No gradient passes to them.
    similarity: `cosine` is minus the cosine of each token and its target, REPA's loss. `nt_xent` is the cross-entropy
        with which a token finds its target among all targets of its image, at temperature tau.
    """
    one_of("repa: similarity", similarity, SIMILARITIES)
    if z.shape != targets.shape:
        raise ConfigError(
            f"the projected features are {list(z.shape)} (batch, tokens, width), the targets {list(targets.shape)}: "
            "the encoder must give one token for each token of the network"
        )
    z, targets = unit(z), jax.lax.stop_gradient(unit(targets))
    if similarity == "cosine":
        return -jnp.sum(z * targets, axis=-1).mean(axis=-1)
    logits = jnp.einsum("bnk,bmk->bnm", z, targets, precision=jax.lax.Precision.HIGHEST) / tau
    own = jnp.diagonal(logits, axis1=1, axis2=2)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - own, axis=-1)


def weight_at(
    step: Array | int, coefficient: float, warmup_steps: int = 0, until: int | None = None, decay_steps: int = 0
) -> Float[Array, ""]:
    """The weight of the term at a step, from 0: see `make`."""
    weight = jnp.float32(coefficient)
    if warmup_steps:
        weight *= jnp.minimum(1.0, step / warmup_steps)
    if until is not None:
        weight *= jnp.clip((until - step) / max(decay_steps, 1), 0.0, 1.0)
    return weight


def names(encoder: str, class_token: bool = False) -> tuple[str, ...]:
    """The names of an encoder's tokens in a batch: the class token if asked for, then the patch tokens."""
    return (f"token/{encoder}",) * class_token + (f"features/{encoder}",)


def targets_of(batch: Batch, encoder: str, class_token: bool = False) -> Float[Array, "b n k"]:
    """The encoder's patch tokens in the batch, behind its class token if asked for."""
    if missing := [name for name in names(encoder, class_token) if name not in batch]:
        raise ConfigError(
            f"repa: the batch has {', '.join(sorted(batch))}, and not {missing[0]}: configure "
            f"config.encoders.{encoder}, or store these features with the data"
        )
    features = batch[f"features/{encoder}"]
    return jnp.concatenate([batch[f"token/{encoder}"][:, None], features], axis=1) if class_token else features


def make(
    *,
    encoder: str = "dinov2",
    block: int = 8,
    coefficient: float = 0.5,
    width: int = 2048,
    similarity: str = "cosine",
    tau: float = 0.1,
    class_token: bool = False,
    warmup_steps: int = 0,
    until: int | None = None,
    decay_steps: int = 0,
    dtype: str = "float32",
) -> AuxLoss:
    """REPA for the trainer, by default with its settings for L and XL; its authors align block 4 of B.

    encoder: the label in `config.encoders` whose features are the targets. block: its output is projected, from 1.
    coefficient: of the term. width: of the projector's hidden layers.
    similarity: see `repa_loss`. tau: temperature of `nt_xent`. We do not know that of the paper: 0.1 is our choice.
    class_token: the class token is the first target. For REG, whose network has one more token.
    warmup_steps: the weight grows linearly from 0 over so many steps.
    until: from this step on the term is exactly 0, as HASTE stops it (arXiv 2505.16792). None: it never stops.
    decay_steps: the weight falls linearly to 0 over so many steps before `until`.
    dtype: of the projector's matmuls.

    Several alignments (encoder, block, weight) are several labels in `config.losses`. The released code averages over
    encoders: with m of them, use 0.5 / m each.
    """
    in_range("repa: warmup_steps", warmup_steps, 0)
    in_range("repa: decay_steps", decay_steps, 0)
    in_range("repa: until", until or 0, 0)
    in_range("repa: width", width, 1, MANY)
    in_range("repa: block", block, 1)
    in_range("repa: tau", tau, above=0)
    one_of("repa: similarity", similarity, SIMILARITIES)
    if decay_steps and until is None:
        raise ConfigError(f"repa: decay_steps = {decay_steps} needs `until`, which is not set")
    compute = jnp.dtype(one_of("repa: dtype", dtype, DTYPES))

    def init(key, forward, batch):
        targets = targets_of(batch, encoder, class_token)
        return init_projector(key, forward.features[block].shape[-1], width, targets.shape[-1])

    def apply(forward, batch, context):
        z = project(context.params, forward.features[block], compute)
        loss = repa_loss(z, targets_of(batch, encoder, class_token), similarity, tau).mean()
        weight = weight_at(context.step, coefficient, warmup_steps, until, decay_steps)
        return Term(weight * loss, {"loss": loss, "weight": weight}, full=coefficient * loss)

    return AuxLoss(apply, init, blocks=(block,), reads=names(encoder, class_token))
