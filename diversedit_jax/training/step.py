"""The state of a run, one pytree, and the training step, one pure function of it.

State: {step, params, ema, losses, opt}. `losses` holds the parameters of auxiliary losses (projector heads), which are
trained beside the model and not part of it. No random state: step i draws from fold_in(key of the run, i).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from diversedit_jax import sharding
from diversedit_jax.api import AuxLoss, Batch, Codec, Forward, Metrics, Objective, Params
from diversedit_jax.models import Model

State = dict[str, Any]


class Parts(NamedTuple):
    """All that a training step is made of; none of it knows the others' names."""

    model: Model
    codec: Codec
    objective: Objective
    losses: Mapping[str, AuxLoss]
    optimizer: optax.GradientTransformation
    ema_decay: float
    accumulate: int = 1


def initializer(parts: Parts, batch: Batch) -> Callable[[Array], State]:
    """key -> the state at step 0. `batch` gives the shapes of a stored batch; its values are not used."""

    def init(key: Array) -> State:
        key_model, key_losses = jax.random.split(key)
        params = parts.model.init(key_model)

        def run(frozen: Any, batch: Batch) -> tuple[Batch, Forward]:
            prepared = parts.codec.encode(frozen, batch, key)
            return prepared, parts.objective(parts.model.network(params), prepared, key)

        shapes = jax.eval_shape(run, jax.eval_shape(parts.codec.init), batch)
        prepared, forward = _zeros(shapes)  # heads take the shapes, and nothing is computed
        heads = {
            label: aux.init(jax.random.fold_in(key_losses, i), forward, prepared)
            for i, (label, aux) in enumerate(parts.losses.items())
        }
        trained = {"params": params, "losses": heads}
        ema = jax.tree.map(jnp.copy, params)  # a copy, not zeros: no bias to correct
        return {"step": jnp.int32(0), "ema": ema, "opt": parts.optimizer.init(trained), **trained}

    return init


def started_from(state: State, given: Params) -> State:
    """A new state with the parameters in `given`, EMA a copy; what `given` lacks keeps its new values."""
    params = {
        name: sharding.put(given[name], jax.tree.map(lambda leaf: leaf.sharding, old)) if name in given else old
        for name, old in state["params"].items()
    }
    return state | {"params": params, "ema": jax.tree.map(jnp.copy, params)}


def train_step(parts: Parts, state: State, frozen: Any, batch: Batch, run_key: Array) -> tuple[State, Metrics]:
    """One update. Metrics: `loss/total`, `loss/objective`, `loss/<label>`, `<label>/<part>`, `grad_norm`.

    Where a loss or the gradient is not finite, the state stays as it was, but for its step: the batch is skipped.

    With `accumulate` = k the batch is cut into k parts, whose gradients are averaged: the same update in 1/k of the
    memory, but losses that couple examples see b/k of them at a time.
    """
    step = state["step"]
    trained = {"params": state["params"], "losses": state["losses"]}
    teacher = parts.model.network(state["ema"])

    def loss_of(trained: State, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        key_objective, key_losses = jax.random.split(key)
        forward = parts.objective(parts.model.network(trained["params"]), batch, key_objective)
        terms, metrics = {"objective": forward.loss.mean()}, dict(forward.metrics)
        for i, (label, aux) in enumerate(parts.losses.items()):
            key_loss = jax.random.fold_in(key_losses, i)
            value, details = aux.apply(trained["losses"][label], forward, batch, teacher, step, key_loss)
            terms[label] = value
            metrics |= {f"{label}/{name}": detail for name, detail in details.items()}
        total = sum(terms.values())
        return total, metrics | {f"loss/{name}": term for name, term in (terms | {"total": total}).items()}

    def gradient(batch: Batch, key: Array) -> tuple[State, Metrics]:
        key_prepare, key_loss = jax.random.split(key)
        prepared = parts.codec.encode(frozen, batch, key_prepare)
        grads, metrics = jax.grad(loss_of, has_aux=True)(trained, prepared, key_loss)
        return grads, metrics

    key = jax.random.fold_in(run_key, step)
    if parts.accumulate == 1:
        grads, metrics = gradient(batch, key)
    else:
        grads, metrics = _accumulated(gradient, batch, key, parts.accumulate)

    updates, opt = parts.optimizer.update(grads, state["opt"], trained)
    trained = optax.apply_updates(trained, updates)
    ema = optax.incremental_update(trained["params"], state["ema"], 1 - parts.ema_decay)
    metrics["grad_norm"] = optax.tree.norm(grads)
    decisive = [value for name, value in metrics.items() if not_finite_ends(name)]
    finite = jnp.isfinite(jnp.stack(decisive)).all()
    before = {name: value for name, value in state.items() if name != "step"}
    after = jax.tree.map(partial(jax.lax.select, finite), {"ema": ema, "opt": opt, **trained}, before)
    return {"step": step + 1, **after}, metrics


def not_finite_ends(metric: str) -> bool:
    """Whether a step counts as failed where the metric of this name is not finite."""
    return metric.startswith("loss/") or metric == "grad_norm"


def _accumulated(gradient: Callable, batch: Batch, key: Array, parts: int) -> tuple[State, Metrics]:
    """The mean of `gradient` over equal parts of the batch, one after another."""
    # part i takes every parts-th example from i on, so that a sharded batch stays where it is
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, parts)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], split), keys[0])

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(*part)), None

    total, _ = jax.lax.scan(add, _zeros(shapes), (split, keys))
    return jax.tree.map(lambda x: x / parts, total)


def _zeros(tree):
    """Zeros of the shapes of a pytree."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
