"""Time the training step of variants of a config: objective, losses, encoders, AdamW, EMA, on data on the device.

`--vs=torch` adds the config's step in PyTorch (`tools.benchmark.torch_twin`), in a process of its own.

- Memory: what the compiled program needs (state, batch, temporaries); of PyTorch, the most that its allocator held.
- MFU: see `diversedit_jax.runtime.flops`. On a device without a known peak, such as a CPU, `of product` is the share of
  what one large matrix product reaches here.
- Dispatch: the time until the call of a step returns, usually while the device is busy with the step before.
"""

import statistics
import time
from functools import partial
from typing import Any

import jax

from diversedit_jax import sharding
from diversedit_jax.runtime import flops
from diversedit_jax.training.step import train_step
from tools.benchmark import random_run, timing

GIB = 2**30
COLUMNS = {
    "ms a step": ("s", 1, 1e3),
    "ratio": ("ratio", 3),
    "images/s": ("images_per_s", 1),
    "TFLOP/s": ("tflops_per_device", 3),
    "MFU %": ("mfu", 1, 100),
    "of product %": ("of_product", 0, 100),
    "peak GiB": ("peak_gib", 2),
    "compile s": ("compile_s", 1),
    "dispatch ms": ("dispatch_ms", 2),
}


def subject(run: random_run.Run, steps: int | None) -> timing.Subject:
    """The compiled step of a run and its state. steps: of one timing; None: as many as take half a second."""
    parts, layout = run.experiment.components, run.experiment.layout
    outputs = (run.shardings, sharding.replicated(layout))
    key = jax.device_put(jax.random.key(1), sharding.replicated(layout))
    work, state = run.work(), run.state()
    begin = time.monotonic()
    with jax.set_mesh(layout.mesh):
        compiled = jax.jit(partial(train_step, parts), donate_argnums=0, out_shardings=outputs)
        step = compiled.lower(state, run.frozen, run.batch, key).compile()
    seconds = time.monotonic() - begin
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    facts = {
        "compile_s": seconds,
        "peak_gib": (held - memory.alias_size_in_bytes) / GIB,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        "gflop_per_image": work / run.config.batch_size / 1e9,
    }
    dispatches: list[float] = []

    def go(count: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(count):
            called = time.perf_counter()
            state, metrics = step(state, run.frozen, run.batch, key)
            dispatches.append(time.perf_counter() - called)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    form, count = timing.counted(go, steps)
    dispatches.clear()
    return timing.Subject(form, count, facts | {"batch_size": run.config.batch_size, "dispatches": dispatches})


def completed(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the rates that follow from its time."""
    rate = row["batch_size"] / row["s"]["median"]
    more: dict[str, Any] = {"images_per_s": rate}
    if "gflop_per_image" in row:
        kind, devices = jax.devices()[0].device_kind, jax.device_count()
        more |= flops.rates(rate * row["gflop_per_image"] * 1e9, 1.0, kind, devices)
        more["dispatch_ms"] = 1e3 * statistics.median(row.pop("dispatches"))
    return row | more


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures and their table."""
    rows = random_run.compared(
        given, "train", lambda run: subject(run, given.steps), lambda run: run.batch, given.steps
    )
    rows = [completed(row) for row in rows]
    product = timing.product_tflops(given.config.model.get("dtype", "float32"))
    counted = [row for row in rows if "tflops_per_device" in row and "mfu" not in row]
    shares = {row["name"]: {"of_product": row["tflops_per_device"] / product} for row in counted}
    table = timing.table_of([row | shares.get(row["name"], {}) for row in rows], COLUMNS)
    return {"product_tflops": product, "rows": rows}, table
