"""The optimizer: AdamW with clipping and a schedule, from optax. Groups of parameters may have their own."""

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

MAIN = "main"  # the group of all parameters that are in no other group


class Optimizer(NamedTuple):
    """transform: of the gradients of all trained parameters. rates: the learning rate at each step, by group."""

    transform: optax.GradientTransformation
    rates: Mapping[str, optax.Schedule]


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
    """AdamW and its learning rate at each step. The defaults are those of REPA and DiverseDiT; SiT does not clip.

    learning_rate: after the warm-up. 0: the parameters are frozen, and have no moments in memory.
    decay: `constant`, or `cosine` down to 0 at `total_steps`; both after a linear warm-up of `warmup_steps`.
    warmup_steps: the rate grows linearly from 0 over so many steps.
    b1, b2: decay of the averages of the gradient and of its square. eps: is added to the root of the second.
    weight_decay: the decoupled one of AdamW.
    clip: the largest global norm of the gradient of its parameters, or None.
    """
    in_range("b1", b1, 0, below=1)
    in_range("b2", b2, 0, below=1)
    in_range("weight_decay", weight_decay, 0)
    in_range("learning_rate", learning_rate, 0)
    in_range("eps", eps, above=0)
    in_range("warmup_steps", warmup_steps, 0)
    rate = optax.constant_schedule(learning_rate)
    if learning_rate == 0:
        return optax.set_to_zero(), rate
    if one_of("decay", decay, ("constant", "cosine")) == "cosine":
        rate = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1))
    if warmup_steps > 0:
        warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps)
        rate = optax.join_schedules([warmup, rate], [warmup_steps])
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if clip is None:
        return adamw, rate
    return optax.chain(optax.clip_by_global_norm(in_range("clip", clip, above=0)), adamw), rate


def group(of: str, **changes: Any) -> ConfigDict:
    """An entry of `config.groups`: the options of `make` for the parameters whose names fit the pattern `of`."""
    config = configs.options(make, **changes)
    config.of = of
    return config


def grouped(total_steps: int, options: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> Optimizer:
    """One optimizer for each group of parameters.

    options: of `make`, for all parameters that are in no group.
    groups:  label -> the options of `make`, and `of`: a pattern (re.search) of the names of its parameters, such as
             `params/deep/`, `losses/LABEL/` or `objective/`. A parameter belongs to the first group that fits.
    """
    made = {}
    for label, given in {MAIN: options, **groups}.items():
        with configs.named("config.optim" if label == MAIN else f"config.groups.{label}", given):
            made[label] = make(total_steps, **{name: value for name, value in given.items() if name != "of"})
    rates = {label: rate for label, (_, rate) in made.items()}
    if all(given.get("learning_rate") == 0 for given in (options, *groups.values())):
        raise ConfigError(
            "config.optim.learning_rate = 0.0: it freezes all that is in no group, and nothing would be trained"
        )
    if not groups:
        return Optimizer(made[MAIN][0], rates)
    patterns = {label: group["of"] for label, group in groups.items()}

    def labels(trained: Any) -> Any:
        def label(path, leaf) -> str:
            name = name_of(path)
            return next((label for label, pattern in patterns.items() if re.search(pattern, name)), MAIN)

        found = jax.tree_util.tree_map_with_path(label, trained)
        for unused in patterns.keys() - set(jax.tree.leaves(found)):
            raise ConfigError(f"config.groups.{unused}: no parameter's name fits {patterns[unused]!r}")
        return found

    return Optimizer(optax.partition({label: transform for label, (transform, _) in made.items()}, labels), rates)
