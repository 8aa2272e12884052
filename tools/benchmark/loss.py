"""Auxiliary losses alone: each loss of variants of a config, with its gradient, on random features of every block.

What the network and the objective would give is given: features [b n d] of each block in `model.stream_dtype`, and what
encoders have seen. A loss with a teacher (SRA) runs it. Memory is what the compiled program needs beside its inputs and
the gradient: the value of a form that stores no products of features is seen there. In a training step the compiler can
merge a loss with what is around it; the whole step is timed by `train`.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diversedit_jax.api import AuxLoss, Context
from diversedit_jax.codecs import encoded, null_condition
from diversedit_jax.errors import ConfigError
from tools.benchmark import random_run, timing, variants
from tools.benchmark.timing import spread_of

GIB = 2**30
AT_LEAST = 0.2  # seconds that a timing takes


def inputs(run: random_run.Run) -> tuple[Any, Any]:
    """What a loss reads, random: the batch as the network gets it, and the result of the objective."""
    parts, key = run.experiment.components, jax.random.key(0)

    def forward(params: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        prepared = encoded(parts.codec, frozen, batch, key)
        null = null_condition(parts.codec, frozen, parts.null)
        return prepared, parts.objective.apply(parts.model.network(params), prepared, Context(key, null))

    rng = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(
                rng.integers(max(run.experiment.space.conditions.classes or 1, 1), size=leaf.shape), leaf.dtype
            )
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    params = jax.eval_shape(parts.model.init, key)
    prepared, made = jax.tree.map(random, jax.eval_shape(forward, params, run.frozen, run.batch))
    return prepared, made._replace(t=jax.nn.sigmoid(made.t))


def subject(run: random_run.Run, aux: AuxLoss, prepared: Any, forward: Any, steps: int | None) -> timing.Subject:
    """A loss, compiled with its gradient with respect to the features and its own parameters."""
    key = jax.random.key(1)
    heads = aux.init(key, forward, prepared) if aux.init else {}
    weights = run.params()  # of a teacher, where there is one

    def value(features: Any, heads: Any, forward: Any, prepared: Any, weights: Any) -> jax.Array:
        teacher = run.experiment.components.model.network(weights)
        context = Context(key, step=jnp.int32(0), params=heads, teacher=teacher)
        return aux.apply(forward._replace(features=features), prepared, context).loss

    given = (forward.features, heads, forward, prepared, weights)
    begin = time.monotonic()
    compiled = jax.jit(jax.value_and_grad(value, (0, 1))).lower(*given).compile()
    facts = {"compile_s": time.monotonic() - begin}
    facts["temporary_gib"] = compiled.memory_analysis().temp_size_in_bytes / GIB

    def go(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            found = compiled(*given)
        jax.block_until_ready(found)
        return time.perf_counter() - begin

    return timing.Subject(*timing.counted(go, steps, AT_LEAST), facts)


def table(rows: timing.Rows) -> str:
    """The rows of a record for a person."""
    lines = [
        [
            found["name"],
            spread_of(found["s"], 2, 1e3),
            spread_of(found["ratio"], 3),
            timing.number(found["temporary_gib"], 3),
            timing.number(found["compile_s"], 1),
        ]
        for found in rows
    ]
    return timing.table(("", "ms", "ratio", "temporary GiB", "compile s"), lines)


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures of a benchmark with these flags, and their table."""
    subjects: dict[str, timing.Subject] = {}
    for name, config in variants.of_flags().items():
        run = random_run.make(config)
        prepared, forward = inputs(run)
        for label, aux in run.experiment.components.losses.items():
            timing.say(f"compiling {label} of {name}")
            with random_run.traced():
                subjects[f"{name}: {label}"] = subject(run, aux, prepared, forward, given.steps)
    if not subjects:
        raise ConfigError("config.losses is empty: there is nothing to time")
    rows = timing.measured(subjects, given.rounds)
    return {"rows": rows}, table(rows)
