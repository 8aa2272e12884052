"""What a run would do: its shapes, memory, examples, steps and hours. Nothing is written."""

import itertools
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import sharding
from diversedit_jax.api import Batch
from diversedit_jax.data import clip_tokenizer
from diversedit_jax.registry import options
from diversedit_jax.runs import build
from diversedit_jax.runtime import flops, versions
from diversedit_jax.runtime.progress import brief, duration
from diversedit_jax.training.step import train_step

SECONDS = 2.0  # of the measurement
LATENTS, IMAGENET, COCO = (32, 32, 4), 1_281_167, 82_783  # of an image of 256 pixels; images of training sets
ON_CPU = 1e12  # FLOPs: a larger step takes a CPU longer than one waits


def with_data(config: ConfigDict) -> tuple[ConfigDict, str | None]:
    """The config, and None. If its data are not given: with random latents, and a line that says so."""
    known = options(configs.factory("data", config.data, "config.data")).items()
    missing = [name for name, one in known if one.default is one.empty and config.data.get(name) is None]
    if not missing:
        return config, None
    config = configs.copied(config)
    shape, classes = tuple(config.data.get("shape") or LATENTS), config.data.get("num_classes") or 1000
    texts = config.text_encoder is not None
    own = {"tokens": clip_tokenizer.LENGTH, "size": COCO} if texts else {"size": IMAGENET}
    video = len(shape) == 4 and config.codec.name == "vae"  # which encodes frames
    config.data = configs.slot("data", "synthetic", shape=shape, num_classes=classes, video=video, **own)
    config.codec = configs.slot("codecs", "pixels")
    kind = f"with {clip_tokenizer.LENGTH} random tokens" if texts else f"of {classes:,} classes"
    what = f"{own['size']:,} random latents {list(shape)} {kind}"
    return config, f"config.data.{missing[0]} is not set: {what} stand in for the data"


class Planned(NamedTuple):
    """A run that was built. abstract: shapes of its state. init: key -> state. work: FLOPs of a step. begin: its step.

    examples: of the data set. batch: the first.
    """

    experiment: build.Experiment
    examples: int
    batch: Batch
    abstract: Any
    init: Any
    key: jax.Array
    work: int
    begin: int


def report(planned: Planned) -> Iterator[str]:
    """Lines about a run, as they are found out: compiling takes a while. The last steps are timed on this machine."""
    config, layout = planned.experiment.config, planned.experiment.layout
    abstract, parts = planned.abstract, planned.experiment.components
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    yield versions.parameter_overview(abstract["params"])
    yield row("network", f"{config.model.name}: {versions.parameter_count(abstract['params']):,} parameters")
    for name, slots in (("losses", config.losses), ("encoders", config.encoders)):
        if slots:
            yield row(name, ", ".join(f"{label} ({slot.name})" for label, slot in slots.items()))
    yield row("batch", ", ".join(f"{name} {shape(leaf)}" for name, leaf in sharding.by_name(planned.batch).items()))
    yield row("mesh", f"{', '.join(f'{axis} {size}' for axis, size in layout.mesh.shape.items())} on {devices}")
    left = config.total_steps - planned.begin
    examples = left * config.batch_size
    epochs = f"{examples / planned.examples:.3g} epochs of {planned.examples:,}"
    yield row("training", f"{left:,} steps of {config.batch_size} = {examples:,} examples, {epochs}")

    shardings = sharding.shardings(abstract, layout)
    placed = sharding.placed(abstract, shardings)
    state, frozen = on_device(placed), jax.eval_shape(parts.codec.init)
    frozen = sharding.placed(frozen, sharding.shardings(frozen, layout))
    outputs = (shardings, sharding.replicated(layout))
    step = jax.jit(partial(train_step, parts), donate_argnums=0, out_shardings=outputs)
    with jax.set_mesh(layout.mesh):
        compiled = step.lower(placed, frozen, planned.batch, planned.key).compile()
    needed, has = memory(compiled) or state, capacity()
    fits = needed < has
    yield row("memory", f"{size(state)} a device for the state, {size(needed)} in a step (compiled), of {size(has)}")
    if not fits:
        yield row("", "it does not fit: take config.mesh.fsdp, config.accumulate, config.model.remat or fewer examples")
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    saved = config.checkpoint
    yield row("checkpoint", f"{size(whole)}, every {saved.every:,} steps; the newest {saved.keep} stay")
    yield row("time", hours(planned, compiled, fits, left, devices))


def hours(planned: Planned, compiled: Any, fits: bool, left: int, devices: str) -> str:
    """How long the steps take: measured, or from what the devices can do at most."""
    on_cpu = jax.default_backend() == "cpu"
    work = f"{planned.work / 1e9:,.3g} GFLOPs a step"
    more = "samples, scores and checkpoints come on top"
    if fits and not (on_cpu and planned.work > ON_CPU * jax.process_count()):
        seconds = measured(planned, compiled)
        return f"{duration(left * seconds)} at {brief(1 / seconds)} steps/s, measured on {devices} ({work}); {more}"
    if peak := flops.peak(jax.devices()[0].device_kind):
        seconds = planned.work / (1e12 * peak * jax.device_count())
        return f"at least {duration(left * seconds)}, at the peak of {devices} ({work}); {more}"
    return f"not known: {work} are too many to measure on {devices}. tools.pod_plan plans slices of TPUs"


def measured(planned: Planned, compiled: Any) -> float:
    """Seconds of a step on this machine, the median of some."""
    layout = planned.experiment.layout
    shardings = sharding.shardings(planned.abstract, layout)
    state = jax.jit(planned.init, out_shardings=shardings)(planned.key)
    frozen = build.frozen_weights(planned.experiment.components.codec, layout)
    found: list[float] = []
    for number in itertools.count():
        begin = time.monotonic()
        state, metrics = compiled(state, frozen, planned.batch, planned.key)
        jax.block_until_ready(metrics)
        if number:  # the first step also warms up
            found.append(time.monotonic() - begin)
        if number and (sum(found) > SECONDS or len(found) == 20):
            return float(np.median(found))
    raise AssertionError


def memory(compiled: Any) -> int | None:
    """Bytes that a program needs on a device, or None if the compiler does not say."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    shared = found.alias_size_in_bytes  # outputs in the place of inputs
    return found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - shared


def capacity() -> int:
    """Bytes of memory that a device has."""
    if limit := (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"):
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def on_device(placed: Any) -> int:
    """Bytes of a pytree on one device."""
    leaves = jax.tree.leaves(placed)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def row(name: str, text: str) -> str:
    """A line of the report."""
    return f"{name:<12}{text}"


def shape(leaf: Any) -> str:
    """The type and shape of an array."""
    return f"{leaf.dtype} {list(leaf.shape)}"


def size(count: int) -> str:
    """A number of bytes for people: 4.7 MB."""
    unit, factor = next((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= f or u == "kB")
    return f"{count / factor:.3g} {unit}"
