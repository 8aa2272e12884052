"""Time each auxiliary loss of variants of a config alone, with its gradient.

The outputs of the network and the encoders are random: features [b n d] of each block in `model.stream_dtype`. A loss
with a teacher (SRA) runs it. Memory is what the compiled program needs beside its inputs and the gradient. In a
training step the compiler can fuse a loss with its neighbours: `train` times the whole step.
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

GIB = 2**30
AT_LEAST = 0.2  # seconds of a timing
COLUMNS = {
    "ms": ("s", 2, 1e3),
    "ratio": ("ratio", 3),
    "temporary GiB": ("temporary_gib", 3),
    "compile s": ("compile_s", 1),
}


def inputs(run: random_run.Run) -> tuple[Any, Any]:
    """Random inputs of a loss: the batch as the network gets it, and the result of the objective."""
    parts, key = run.experiment.components, jax.random.key(0)

    def forward(params: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
        prepared = encoded(parts.codec, frozen, batch, key)
        null = null_condition(parts.codec, frozen, parts.null)
        return prepared, parts.objective.apply(parts.model.network(params), prepared, Context(key, null))

    rng = np.random.default_rng(0)

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            classes = run.experiment.space.conditions.classes or 1
            return jnp.asarray(rng.integers(classes, size=leaf.shape), leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    params = jax.eval_shape(parts.model.init, key)
    prepared, made = jax.tree.map(random, jax.eval_shape(forward, params, run.frozen, run.batch))
    return prepared, made._replace(t=jax.nn.sigmoid(made.t))


def subject(run: random_run.Run, aux: AuxLoss, prepared: Any, forward: Any, steps: int | None) -> timing.Subject:
    """A loss, compiled with its gradient for the features and its own parameters."""
    key = jax.random.key(1)
    heads = aux.init(key, forward, prepared) if aux.init else {}
    weights = run.params()  # of a teacher

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


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures and their table."""
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
    return {"rows": rows}, timing.table_of(rows, COLUMNS)
