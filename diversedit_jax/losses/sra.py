"""Self-representation alignment: a block's features, through a head, against a later block of the EMA network at a
less noisy time (SRA, arXiv 2505.02831).

The teacher sees the same examples with the same noise and the same dropped conditions. The functions take features of
any framework (`arrays.portable`), [b n d], and compute in float32 (float64 for float64 input).
"""

import jax
import jax.numpy as jnp

from diversedit_jax.api import AuxLoss, Term
from diversedit_jax.arrays import portable
from diversedit_jax.errors import ConfigError
from diversedit_jax.losses._shared import DTYPES, head, init_head, unit, wide
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.shapes import Array, Float, PRNGKeyArray

BETA = 0.05  # of smooth L1: below it the error is quadratic


def earlier(
    key: PRNGKeyArray, t: Float[Array, " b"], t_max: float = 0.2, num_timesteps: int | None = None
) -> Float[Array, " b"]:
    """The teacher's times: t minus a draw from U[0, t_max) per example, at least 0.

    num_timesteps: t counts steps, 0 .. num_timesteps - 1. The draw is then a whole number of steps below t_max *
        num_timesteps, and the teacher's step is at least 1 (SRA on DiT).
    """
    if num_timesteps is not None:
        lag = jax.random.randint(key, t.shape, 0, round(t_max * num_timesteps))
        return jnp.maximum(t - lag, 1.0)
    lag = t_max * jax.random.uniform(key, t.shape)
    # A t above 1 counts steps. Without num_timesteps the teacher would be silently wrong: NaN stops the run.
    return jnp.where(t > 1, jnp.nan, jnp.maximum(t - lag, 0.0))


def smooth_l1(a: Array, b: Array) -> Array:
    """|a - b| - beta / 2; where |a - b| < beta: (a - b)^2 / (2 beta)."""
    gap = jnp.abs(a - b)
    return jnp.where(gap < BETA, gap**2 / (2 * BETA), gap - BETA / 2)


def one_minus_cosine(a: Array, b: Array, axis: int) -> Array:
    """1 - cosine of the vectors along an axis."""
    return 1 - jnp.sum(unit(a, axis) * unit(b, axis), axis=axis)


DISTANCES = {
    "smooth_l1": smooth_l1,
    "l1": lambda a, b: jnp.abs(a - b),
    "l2": lambda a, b: (a - b) ** 2,
    "cosine": lambda a, b: one_minus_cosine(a, b, axis=-1),
    "cosine_tokens": lambda a, b: one_minus_cosine(a, b, axis=1),
}


@portable
def sra_loss(
    student: Float[Array, "b n d"], teacher: Float[Array, "..."], form: str = "smooth_l1"
) -> Float[Array, " b"]:
    """The mean distance of each example's features from the teacher's. No gradient passes to the teacher.

    form: `smooth_l1` (the paper), `l1`, `l2` (squared), `cosine` (1 - cosine of each token's channels) or
        `cosine_tokens` (1 - cosine of each channel's tokens, as in the authors' code).
    """
    one_of("sra: distance", form, DISTANCES)
    student, teacher = wide(student), jax.lax.stop_gradient(wide(teacher))
    if student.shape != teacher.shape:
        raise ConfigError(f"sra: the student's features are {list(student.shape)}, the teacher's {list(teacher.shape)}")
    errors = DISTANCES[form](student, teacher)
    return errors.mean(axis=tuple(range(1, errors.ndim)))


def weight_at(
    step: Array | int,
    coefficient: float = 0.2,
    decay_from_epoch: int = 149,
    decay_epochs: int | None = 1000,
    steps_per_epoch: int = 5004,
) -> Float[Array, ""]:
    """The weight of the term at a step, from 0: see `make`."""
    if decay_epochs is None:
        return jnp.float32(coefficient)
    late = jnp.maximum(step // steps_per_epoch - decay_from_epoch, 0)
    return coefficient * jnp.float32(0.1) ** (late / decay_epochs)


def make(
    *,
    block: int = 3,
    teacher_block: int = 8,
    t_max: float = 0.2,
    num_timesteps: int | None = None,
    distance: str = "smooth_l1",
    coefficient: float = 0.2,
    decay_from_epoch: int = 149,
    decay_epochs: int | None = 1000,
    steps_per_epoch: int = 5004,
    dtype: str = "float32",
) -> AuxLoss:
    """SRA for the trainer, by default with the paper's settings for SiT-B at 256 pixels; L: 6 -> 16, XL: 8 -> 20.

    block, teacher_block: their outputs are compared, from 1. The teacher runs no further than `teacher_block`.
    t_max: how much earlier the teacher's time may be.
    num_timesteps: of an objective whose times are steps (ddpm: 1000). On DiT-XL SRA takes blocks 8 -> 16 and the
        coefficient 0.04.
    distance: `smooth_l1`, `l1`, `l2`, `cosine` or `cosine_tokens`, see `sra_loss`. The authors' later default is
        `cosine_tokens`, coefficient 0.5, decay_epochs None, because smooth L1 grows with the norm of the features.
    coefficient: of the term, until its decay.
    decay_from_epoch: the coefficient falls after this epoch, counted from 0; at 512 pixels the authors take 99.
    decay_epochs: so many epochs divide it by 10. None: never. At 512 pixels the authors take 800.
    steps_per_epoch: steps of an epoch.
    dtype: of the head's matmuls.
    """
    one_of("sra: distance", distance, DISTANCES)
    in_range("sra: block", block, 1)
    in_range("sra: teacher_block", teacher_block, 1)
    in_range("sra: t_max", t_max, 0, 1)
    in_range("sra: decay_from_epoch", decay_from_epoch, 0)
    in_range("sra: steps_per_epoch", steps_per_epoch, 1)
    in_range("sra: decay_epochs", 1 if decay_epochs is None else decay_epochs, 1)
    in_range("sra: num_timesteps", 1 if num_timesteps is None else num_timesteps, 1)
    if num_timesteps is not None and t_max * num_timesteps < 1:
        raise ConfigError(f"sra: t_max = {t_max} of num_timesteps = {num_timesteps} is less than one step")
    compute = jnp.dtype(one_of("sra: dtype", dtype, DTYPES))

    def init(key, forward, batch):
        d = forward.features[block].shape[-1]
        return init_head(key, (d, 2 * d, d))

    def apply(forward, batch, context):
        t = earlier(context.key, forward.t, t_max, num_timesteps)
        _, seen = forward.rerun(context.teacher, t)
        student = head(context.params, forward.features[block], compute)
        loss = sra_loss(student, seen[teacher_block], distance).mean()
        weight = weight_at(context.step, coefficient, decay_from_epoch, decay_epochs, steps_per_epoch)
        metrics = {"distance": loss, "weight": weight, "lag": (forward.t - t).mean()}
        return Term(weight * loss, metrics, full=coefficient * loss)

    return AuxLoss(apply, init, blocks=(block, teacher_block))
