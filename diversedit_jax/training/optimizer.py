"""The optimizer: AdamW with clipping and a schedule, all from optax; groups of parameters may have their own."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.sharding import name_of

MAIN = "main"  # the group of all parameters that no other group takes


class Optimizer(NamedTuple):
    """transform: of the gradients of all trained parameters. rates: the learning rate at each step, by group."""

    transform: optax.GradientTransformation
    rates: Mapping[str, optax.Schedule]


def schedule(total_steps: int, *, learning_rate: float, decay: str, warmup_steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then `constant`, or `cosine` down to 0 at `total_steps`."""
    if one_of("optim.decay", decay, ("constant", "cosine")) == "cosine":
        body = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1))
    else:
        body = optax.constant_schedule(learning_rate)
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

    decay: `constant` or `cosine`. clip: the largest global norm of the gradient of its parameters, or None.
    """
    in_range("optim.b1", b1, 0, below=1)
    in_range("optim.b2", b2, 0, below=1)
    in_range("optim.weight_decay", weight_decay, 0)
    in_range("optim.learning_rate", learning_rate, above=0)
    in_range("optim.eps", eps, above=0)
    in_range("optim.clip", 1.0 if clip is None else clip, above=0)
    in_range("optim.warmup_steps", warmup_steps, 0)
    rate = schedule(total_steps, learning_rate=learning_rate, decay=decay, warmup_steps=warmup_steps)
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return (adamw if clip is None else optax.chain(optax.clip_by_global_norm(clip), adamw)), rate


def group(of: str, **changes: Any) -> ConfigDict:
    """An entry of `config.groups`: the parameters whose names fit the pattern `of`, and the options of `make`."""
    config = configs.options(make, **changes)
    config.of = of
    return config


def grouped(total_steps: int, options: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> Optimizer:
    """An optimizer for each group of parameters.

    options: those of `make` for all parameters that are in no group.
    groups:  label -> the options of `make`, and `of`: a pattern (re.search) of the names that the group takes, such as
             `params/deep/` of the network, `losses/repa/` or `objective/vae/`. The first group that fits takes them.
    """
    if not groups:
        transform, rate = make(total_steps, **options)
        return Optimizer(transform, {MAIN: rate})
    own = {label: {name: value for name, value in group.items() if name != "of"} for label, group in groups.items()}
    made = {label: make(total_steps, **given) for label, given in ({MAIN: options} | own).items()}

    def labels(trained: Any) -> Any:
        def label(path, leaf) -> str:
            name = name_of(path)
            return next((label for label, group in groups.items() if re.search(group["of"], name)), MAIN)

        found = jax.tree_util.tree_map_with_path(label, trained)
        for unused in groups.keys() - set(jax.tree.leaves(found)):
            raise ConfigError(f"config.groups.{unused}: no parameter's name fits {groups[unused]['of']!r}")
        return found

    transform = optax.partition({name: transform for name, (transform, _) in made.items()}, labels)
    return Optimizer(transform, {name: rate for name, (_, rate) in made.items()})
