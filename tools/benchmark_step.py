"""Time the training step of several forms of a model in one interleaved run, and compare them as ratios.

    python -m tools.benchmark_step --size=B --batch_size=32 --variants=plain,skips,diversity

The real step (objective, losses, AdamW, EMA) on synthetic latents that stay on the device. Rounds go through all
variants in turn, so that what disturbs the machine disturbs them alike; a variant's time is the median over rounds.
"""

import json
import statistics
import time
from functools import partial
from pathlib import Path

import jax
from absl import app, flags

from configs import default
from diversedit_jax import experiment, flops, logs, sharding
from diversedit_jax.config import slot
from diversedit_jax.data import synthetic
from diversedit_jax.train_state import initializer, train_step

# What a variant changes in a plain SiT: keys of the model, options of the diversity loss (None: no such loss).
VARIANTS = {
    "plain": ({}, None),
    "skips": ({"skip": "release"}, None),
    "diversity": ({"skip": "release"}, {}),
    "all_pairs": ({"skip": "release"}, {"rule": "all"}),
    "random_layers": ({"skip": "release"}, {"rule": "random_layers", "redraw": True}),
    "remat_full": ({"skip": "release", "remat": "full"}, {}),
    "remat_dots": ({"skip": "release", "remat": "dots"}, {}),
    "remat_none": ({"skip": "release", "remat": "none"}, {}),
    "bf16_stream": ({"skip": "release", "stream_dtype": "bfloat16"}, {}),
}

SIZE = flags.DEFINE_string("size", "B", "Model size: S, B, L or XL.")
SIDE = flags.DEFINE_integer("side", 32, "Height and width of the latents: 32 for images of 256 pixels.")
DEPTH = flags.DEFINE_integer("depth", None, "Blocks, to try a large width on a small machine.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of matmuls.")
BATCH = flags.DEFINE_integer("batch_size", 32, "Over all devices.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "How often each variant is timed.")
STEPS = flags.DEFINE_integer("steps", 5, "Steps in one timing.")
NAMES = flags.DEFINE_list("variants", ["plain", "skips", "diversity"], f"Of {', '.join(VARIANTS)}.")
OUT = flags.DEFINE_string("json", None, "File to write the figures to.")


def prepare(name: str):
    """A compiled step of a variant, its state and its batch, and what the compiler says of it."""
    model, diversity = VARIANTS[name]
    shape = (SIDE.value, SIDE.value, 4)
    config = default.get_config()
    config.batch_size = BATCH.value
    config.prepare = slot("prepare", "pixels")
    config.model.update({"size": SIZE.value, "dtype": DTYPE.value, **model})
    if DEPTH.value:
        config.model.depth = DEPTH.value
    if diversity is not None:
        config.losses.diversity = slot("losses", "diversity", **diversity)
    layout, parts, _, _ = experiment.build(config, shape, 1000)
    data = synthetic.make("train", shape=shape)
    examples = [data.source[i] for i in range(config.batch_size)]
    batch = jax.device_put(
        {key: jax.numpy.stack([example[key] for example in examples]) for key in examples[0]},
        sharding.over_batch(layout),
    )
    key = jax.random.key(0)
    init = initializer(parts, batch)
    abstract = jax.eval_shape(init, key)
    shardings = sharding.shardings(abstract, layout)
    state = jax.jit(init, out_shardings=shardings)(key)
    outputs = (shardings, sharding.replicated(layout))
    begin = time.monotonic()
    step = jax.jit(partial(train_step, parts), donate_argnums=0, out_shardings=outputs)
    with jax.set_mesh(layout.mesh):
        step = step.lower(state, {}, batch, key).compile()
    memory = step.memory_analysis()
    facts = {
        "compile_s": round(time.monotonic() - begin, 1),
        "temp_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
        "gflop": round(experiment.work(config, parts, shape, 1000, abstract, batch) / BATCH.value / 1e9, 2),
    }
    return step, state, batch, key, facts


def main(_) -> None:
    """Compile all, then time them in turn."""
    logs.silence()
    runs = {name: prepare(name) for name in NAMES.value}
    states = {name: run[1] for name, run in runs.items()}
    times = {name: [] for name in runs}
    for round_ in range(ROUNDS.value + 1):
        for name, (step, _, batch, key, _) in runs.items():
            begin = time.perf_counter()
            for _ in range(STEPS.value):
                states[name], _ = step(states[name], {}, batch, key)
            jax.block_until_ready(states[name])
            if round_:  # the first round warms up
                times[name].append((time.perf_counter() - begin) / STEPS.value)
    rows = {}
    first = statistics.median(times[NAMES.value[0]])
    for name, (*_, facts) in runs.items():
        seconds = statistics.median(times[name])
        rate = BATCH.value / seconds
        done = flops.rates(rate * facts["gflop"] * 1e9, 1.0, jax.devices()[0].device_kind, jax.device_count())
        rows[name] = {"ms": seconds * 1e3, "ratio": seconds / first, "images/s": rate} | done | facts
    versions = logs.versions()
    where = f"{versions['devices']} ({versions['backend']}), jax {versions['jax']}"
    print(f"SiT-{SIZE.value}/2, latents of {SIDE.value} x {SIDE.value}, batch {BATCH.value}, {DTYPE.value}, on {where}")
    columns = {"ms": 1, "ratio": 3, "images/s": 1, "tflops_per_device": 2, "mfu": 3, "gflop": 2, "temp_gib": 2}
    columns |= {"compile_s": 1}
    if flops.peak(jax.devices()[0].device_kind) is None:
        del columns["mfu"]
    print("".join([f"{'variant':<15}", *(f"{column:>{len(column) + 2}}" for column in columns)]))
    for name, row in rows.items():
        shown = (f"{row[column]:>{len(column) + 2},.{digits}f}" for column, digits in columns.items())
        print("".join([f"{name:<15}", *shown]))
    if OUT.value:
        given = {name: flags.FLAGS[name].value for name in ("size", "side", "depth", "batch_size", "dtype")}
        Path(OUT.value).write_text(
            json.dumps({"versions": versions, "flags": given, "variants": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    app.run(main)
