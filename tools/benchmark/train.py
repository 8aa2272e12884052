"""The training step of variants of a config, in turn: objective, losses, encoders, AdamW, EMA, on data that stay on the
device. `--vs=torch` adds the config's step in PyTorch (`tools.benchmark.torch_twin`), in a process of its own.

Memory is what the compiled program needs: state, batch and temporaries, as the compiler says; of PyTorch what its
allocator held at most. MFU is as in `diversedit_jax.runtime.flops`; where a device's peak is not known, as of CPUs, `of
product` is the share of what one large product reaches here. Dispatch is the time until the call of a step returns, in
most calls while the device is still busy with the one before.
"""

import contextlib
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from diversedit_jax import sharding
from diversedit_jax.runtime import flops
from diversedit_jax.training.step import train_step
from tools.benchmark import random_run, timing, variants
from tools.benchmark.timing import spread_of

GIB = 2**30
AT_LEAST = 0.5  # seconds that a timing takes


def subject(run: random_run.Run, steps: int | None) -> timing.Subject:
    """The compiled step of a run and its state. steps: in one timing; None: as many as take half a second."""
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

    form, count = timing.counted(go, steps, AT_LEAST)
    dispatches.clear()
    return timing.Subject(form, count, facts | {"batch_size": run.config.batch_size, "dispatches": dispatches})


def completed(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what follows from its time."""
    rate = row["batch_size"] / row["s"]["median"]
    more: dict[str, Any] = {"images_per_s": rate}
    if "gflop_per_image" in row:
        kind, devices = jax.devices()[0].device_kind, jax.device_count()
        more |= flops.rates(rate * row["gflop_per_image"] * 1e9, 1.0, kind, devices)
        more["dispatch_ms"] = 1e3 * statistics.median(row.pop("dispatches"))
    return row | more


def table(rows: timing.Rows, product: float) -> str:
    """The rows of a record for a person."""
    heads = ("", "ms a step", "ratio", "images/s", "TFLOP/s", "MFU %", "of product %", "peak GiB", "compile s")
    heads += ("dispatch ms",)

    def cells(found: Mapping[str, Any]) -> list[str]:
        tflops, mfu = found.get("tflops_per_device"), found.get("mfu")
        share = None if tflops is None or mfu is not None else 100 * tflops / product
        return [
            found["name"],
            spread_of(found["s"], 1, 1e3),
            spread_of(found["ratio"], 3),
            timing.number(found["images_per_s"], 1),
            timing.number(tflops, 3),
            timing.number(None if mfu is None else 100 * mfu, 1),
            timing.number(share, 0),
            timing.number(found.get("peak_gib"), 2),
            timing.number(found["compile_s"], 1),
            timing.number(found.get("dispatch_ms"), 2),
        ]

    return timing.table(heads, [cells(found) for found in rows])


def main(given: Any) -> tuple[dict[str, Any], str]:
    """The figures of a benchmark with these flags, and their table."""
    subjects: dict[str, timing.Subject] = {}
    with contextlib.ExitStack() as stack:
        for name, config in variants.of_flags().items():
            timing.say(f"compiling {name}")
            run = random_run.make(config)
            subjects[name] = subject(run, given.steps)
            if given.vs and len(subjects) == 1:
                twin = stack.enter_context(random_run.in_torch(run, "train", run.batch))
                theirs = twin.facts | {"batch_size": run.config.batch_size}
                subjects[random_run.torch_name(twin)] = timing.Subject(
                    *timing.counted(twin.run, given.steps, AT_LEAST), theirs
                )
        rows = timing.measured(subjects, given.rounds)
        if given.vs and (held := twin.peak_bytes()):
            rows[1]["peak_gib"] = held / GIB
    rows = [completed(row) for row in rows]
    product = timing.product_tflops(given.config.model.get("dtype", "float32"))
    return {"product_tflops": product, "rows": rows}, table(rows, product)
