"""The state of a run, one pytree, and the training step, one function of it.

step               number of steps done.
params, ema        of the network, and their exponential moving average.
losses, objective  parameters of auxiliary losses (projectors) and of the objective, trained beside the network.
memory             arrays that losses and the objective keep from step to step, without gradients.
ema_memory         the moving average of `memory`.
opt                state of the optimizer.

It holds no random state: step i draws from fold_in(key of the run, i).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from diversedit_jax import sharding
from diversedit_jax.api import (
    AuxLoss,
    Batch,
    Codec,
    Condition,
    Context,
    Forward,
    Metrics,
    Model,
    Objective,
    Params,
    Rows,
)
from diversedit_jax.codecs import encoded, null_condition
from diversedit_jax.errors import ConfigError

State = dict[str, Any]
TRAINED = ("params", "losses", "objective")


class Components(NamedTuple):
    """The components of a training step. None of them knows the names of the others.

    optimizer: for a dict with the entries TRAINED. null: the stored null condition.
    """

    model: Model
    codec: Codec
    objective: Objective
    losses: Mapping[str, AuxLoss]
    optimizer: optax.GradientTransformation
    ema_decay: float
    accumulate: int = 1
    null: Condition = None


def initializer(components: Components, batch: Batch) -> Callable[[Array], State]:
    """key -> the state at step 0. batch: a stored batch; only its shapes are used."""
    objective, losses = components.objective, components.losses

    def init(key: Array) -> State:
        key_model, key_losses = jax.random.split(key)
        params = components.model.init(key_model)
        frozen = jax.eval_shape(components.codec.init)
        prepared = _zeros(jax.eval_shape(partial(encoded, components.codec, key=key), frozen, batch))
        for place, part in {
            "objective": objective,
            **{f"losses.{label}": aux for label, aux in losses.items()},
        }.items():
            if missing := [name for name in part.reads if name not in prepared]:
                given = f"a batch has {', '.join(sorted(prepared))}"
                raise ConfigError(
                    f"config.{place} reads `{missing[0]}`, but {given}: give config.encoders or data with it"
                )
        own = objective.init(jax.random.fold_in(key_losses, len(losses)), prepared) if objective.init else {}
        memory = {"objective": objective.memory(prepared)} if objective.memory else {}

        def run(frozen: Any, prepared: Batch) -> Forward:
            null = null_condition(components.codec, frozen, components.null)
            context = Context(key, null, params=own, memory=memory.get("objective"))
            return objective.apply(components.model.network(params), prepared, context)

        forward = _zeros(jax.eval_shape(run, frozen, prepared))  # losses need its shapes; nothing is computed
        heads = {
            label: aux.init(jax.random.fold_in(key_losses, i), forward, prepared) if aux.init else {}
            for i, (label, aux) in enumerate(losses.items())
        }
        memories = {label: aux.memory(forward, prepared) for label, aux in losses.items() if aux.memory}
        memory |= {"losses": memories} if memories else {}
        trained = {"params": params, "losses": heads, "objective": own}
        return {
            "step": jnp.int32(0),
            "ema": jax.tree.map(jnp.copy, params),  # a copy, not zeros: no bias to correct
            "memory": memory,
            "ema_memory": jax.tree.map(jnp.copy, memory),
            "opt": components.optimizer.init(trained),
            **trained,
        }

    return init


def started_from(state: State, given: Params) -> State:
    """The state with these top-level entries of the parameters; the others stay. The EMA is a copy.

    given: arrays on the host. Of a parameter that has only `Rows` there, the other rows stay.
    """

    def leaf(value: np.ndarray | Rows, own: Array) -> Array:
        if not isinstance(value, Rows):
            return sharding.put(value, own.sharding)
        put = jax.jit(lambda own, rows: own.at[np.array(value.at)].set(rows), out_shardings=own.sharding)
        return put(own, value.values)

    params = state["params"]
    params = params | {name: jax.tree.map(leaf, tree, params[name]) for name, tree in given.items()}
    return state | {"params": params, "ema": jax.tree.map(jnp.copy, params)}


def total_loss(
    components: Components, trained: State, memory: State, state: State, batch: Batch, null: Condition, key: Array
) -> tuple[Array, tuple[Metrics, State]]:
    """The objective plus all auxiliary losses on an encoded batch; its metrics and the new memory."""
    key_objective, key_losses = jax.random.split(key)
    context = Context(key_objective, null, state["step"], teacher=components.model.network(state["ema"]))
    own = context._replace(params=trained["objective"], memory=memory.get("objective"))
    forward = components.objective.apply(components.model.network(trained["params"]), batch, own)
    terms, metrics = {"objective": forward.loss.mean()}, dict(forward.metrics)
    after = memory if forward.memory is None else memory | {"objective": forward.memory}
    for i, (label, aux) in enumerate(components.losses.items()):
        own = {"params": trained["losses"][label], "memory": memory.get("losses", {}).get(label)}
        term = aux.apply(forward, batch, context._replace(key=jax.random.fold_in(key_losses, i), **own))
        terms[label] = term.loss
        metrics |= {f"{label}/{name}": value for name, value in term.metrics.items()}
        if term.memory is not None:
            after = after | {"losses": after.get("losses", {}) | {label: term.memory}}
    total = sum(terms.values())
    metrics |= {f"loss/{name}": term for name, term in (terms | {"total": total}).items()}
    if _shapes(after) != _shapes(memory):
        raise ConfigError("an objective or a loss returns a memory of other shapes than it began with")
    return total, (metrics, after)


def train_step(
    components: Components, state: State, frozen: Any, batch: Batch, run_key: Array
) -> tuple[State, Metrics]:
    """One update. Metrics: `loss/total`, `loss/objective`, `loss/LABEL`, `LABEL/METRIC`, `grad_norm`.

    If a loss or the gradient is not finite, the batch is skipped: only the number of the step changes.

    With `accumulate` = k the gradient is the mean over k parts of the batch, one after another: the same update in 1/k
    of the memory. Losses that couple examples then see b/k of them at a time.
    """
    trained = {name: state[name] for name in TRAINED}

    def gradient(memory: State, batch: Batch, key: Array) -> tuple[State, tuple[State, Metrics]]:
        key_codec, key_loss = jax.random.split(key)
        prepared = encoded(components.codec, frozen, batch, key_codec)
        null = null_condition(components.codec, frozen, components.null)

        def loss(trained: State) -> tuple[Array, tuple[Metrics, State]]:
            return total_loss(components, trained, memory, state, prepared, null, key_loss)

        grads, (metrics, after) = jax.grad(loss, has_aux=True)(trained)
        return after, (grads, metrics)

    key = jax.random.fold_in(run_key, state["step"])
    if components.accumulate == 1:
        memory, (grads, metrics) = gradient(state["memory"], batch, key)
    else:
        memory, (grads, metrics) = _accumulated(gradient, state["memory"], batch, key, components.accumulate)

    updates, opt = components.optimizer.update(grads, state["opt"], trained)
    trained = optax.apply_updates(trained, updates)
    after = {
        "ema": _averaged(trained["params"], state["ema"], components.ema_decay),
        "memory": memory,
        "ema_memory": _averaged(memory, state["ema_memory"], components.ema_decay),
        "opt": opt,
        **trained,
    }
    metrics["grad_norm"] = optax.tree.norm(grads)
    finite = jnp.isfinite(jnp.stack([value for name, value in metrics.items() if must_be_finite(name)])).all()
    before = {name: state[name] for name in after}
    after = jax.tree.map(partial(jax.lax.select, finite), after, before)
    return {"step": state["step"] + 1, **after}, metrics


def _averaged(new: Any, old: Any, decay: float) -> Any:
    """The moving average of a pytree of floating-point arrays. Integers are taken as they are: they count.

    In this form an array that does not change is its own average, to the bit.
    """

    def leaf(new: Array, old: Array) -> Array:
        return old + (1 - decay) * (new - old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    return jax.tree.map(leaf, new, old)


def must_be_finite(metric: str) -> bool:
    """Whether a batch is skipped if the metric of this name is not finite."""
    return metric.startswith("loss/") or metric == "grad_norm"


def _accumulated(
    gradient: Callable, memory: State, batch: Batch, key: Array, parts: int
) -> tuple[State, tuple[State, Metrics]]:
    """The last memory, and the mean of `gradient` over equal parts of the batch, one after another."""
    # part i takes examples i, i + parts, ...: a sharded batch stays on its devices
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, parts)
    _, shapes = jax.eval_shape(gradient, memory, jax.tree.map(lambda x: x[0], split), keys[0])

    def add(carry, part):
        memory, total = carry
        memory, found = gradient(memory, *part)
        return (memory, jax.tree.map(jnp.add, total, found)), None

    (memory, total), _ = jax.lax.scan(add, (memory, _zeros(shapes)), (split, keys))
    return memory, jax.tree.map(lambda x: x / parts, total)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
