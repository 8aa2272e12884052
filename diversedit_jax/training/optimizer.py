"""The optimizer: AdamW with clipping and a learning-rate schedule, all from optax."""

import optax

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion


def schedule(total_steps: int, *, learning_rate: float, decay: str, warmup_steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then `constant`, or `cosine` down to 0 at `total_steps`."""
    if decay == "cosine":
        body = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1))
    elif decay == "constant":
        body = optax.constant_schedule(learning_rate)
    else:
        raise ConfigError(f"config.optim.decay = {decay!r} is unknown; {suggestion(decay, ('constant', 'cosine'))}")
    if warmup_steps == 0:
        return body
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, body], [warmup_steps])


def make(
    total_steps: int,
    *,
    learning_rate: float = 1e-4,
    decay: str = "constant",
    warmup_steps: int = 0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW, by default as SiT, REPA and DiverseDiT train; and its schedule, for the log.

    decay: `constant` or `cosine`. clip: largest global norm of the gradient, or None.
    """
    for name, value, limit in [("b1", b1, 1), ("b2", b2, 1), ("weight_decay", weight_decay, float("inf"))]:
        if not 0 <= value < limit:
            raise ConfigError(f"config.optim.{name} = {value}: must be in [0, {limit})")
    for name, value in [("learning_rate", learning_rate), ("eps", eps), ("clip", 1.0 if clip is None else clip)]:
        if not 0 < value < float("inf"):
            raise ConfigError(f"config.optim.{name} = {value}: must be a finite number > 0")
    if warmup_steps < 0:
        raise ConfigError(f"config.optim.warmup_steps = {warmup_steps}: must not be negative")
    rate = schedule(total_steps, learning_rate=learning_rate, decay=decay, warmup_steps=warmup_steps)
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return (adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)), rate
