"""Train a model: python -m diversedit_jax.train --config=configs/digits.py --workdir=DIR [--config.KEY=VALUE ...]

The same command resumes a run that was stopped, at the step of its last checkpoint, with the same results to the bit.
Ctrl-C and SIGTERM save and exit with code 42. In DIR: config.json, versions.json, parameters.txt, metrics.jsonl and
TensorBoard events, samples/ and samples.png, checkpoints/.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from diversedit_jax import config as configs
from diversedit_jax import sharding
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.evaluators import Current
from diversedit_jax.registry import suggestion
from diversedit_jax.runs import build
from diversedit_jax.runtime import cli, flops, processes, profiler, workdir_lock
from diversedit_jax.runtime.cli import silence
from diversedit_jax.runtime.files import writable_folder
from diversedit_jax.runtime.metric_writer import MetricWriter
from diversedit_jax.runtime.pictures import image_grid, save_png
from diversedit_jax.runtime.progress import Progress, duration
from diversedit_jax.runtime.versions import parameter_overview, versions
from diversedit_jax.sampling import sampler
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.step import State, initializer, not_finite_ends, started_from, train_step


def run(config: ConfigDict, workdir: str | Path) -> State:
    """Train as `config` says, from the last checkpoint in `workdir` if there is one; returns the final state."""
    silence()
    workdir = writable_folder(workdir)
    processes.check_shared(workdir)
    with contextlib.ExitStack() as stack:  # no other run writes there meanwhile
        processes.first_alone(lambda: stack.enter_context(workdir_lock.held(workdir, say)))
        return train(config, workdir)


def say(line: str) -> None:
    """A line before there is a progress bar."""
    print(line, file=sys.stderr, flush=True)


def train(config: ConfigDict, workdir: Path) -> State:
    """The story of a run, once its directory is its own."""
    # --- The parts of the run, and everything that can be refused, before anything compiles.
    started = time.monotonic()
    processes.agree("config", configs.flat(config.to_dict()))
    dataset = build.open_data(config)
    layout, parts, sample, rate = build.build(config, dataset.shape, dataset.num_classes)
    sampler.check_guidance(config.sampler.cfg_scale, dataset.num_classes)
    profiler.windows(config.profile)
    if config.max_skipped < 0:
        raise ConfigError(f"config.max_skipped = {config.max_skipped}: must not be negative")
    evaluators = build.evaluators(config, parts, dataset.shape, dataset.num_classes)
    key_init, key_run = jax.random.split(jax.random.key(config.seed))

    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        best=config.checkpoint.best,
        lower=config.checkpoint.lower,
    )
    judge = build.best_by(config)
    start = processes.number_of_first(checkpoints.latest() or 0)
    faults: list[str] = []  # of records that could not be read
    loading = {"rows": sharding.rows(layout, config.batch_size), "report": faults.append}
    loading |= configs.keywords(config.input, "config.input", pipeline.batches)
    loader = pipeline.batches(dataset, config.batch_size, config.seed, start, **loading)

    def next_batch() -> dict[str, jax.Array]:
        # Called as soon as a step is dispatched: the batch is read and transferred while the device computes.
        return sharding.from_rows(next(loader), layout, config.batch_size)

    batch = next_batch()  # reads real data, so that what is wrong with it is said now
    init = initializer(parts, batch)
    try:
        abstract = jax.eval_shape(init, key_init)
        work = build.work(config, parts, dataset.shape, dataset.num_classes, abstract, batch)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config cannot be traced: {error}") from error
    state_shardings = sharding.shardings(abstract, layout)
    target = sharding.placed(abstract, state_shardings)
    given = build.starting_params(config, abstract["params"]) if not start else None
    notes = processes.first_alone(lambda: configs.claim(workdir, config)) or []

    # --- The state: born sharded, or read back.
    frozen = build.prepared(parts.codec, layout)
    if start:
        state, whole, damaged = checkpoints.restore_newest(target)
        notes += damaged
        if whole != start:
            start = whole
            loader.close()
            loader = pipeline.batches(dataset, config.batch_size, config.seed, start, **loading)
            batch = next_batch()
        notes.append(f"resuming from step {start} of {config.total_steps}")
        skipped = checkpoints.meta(start).get("skipped", 0)
    else:
        state = jax.jit(init, out_shardings=state_shardings)(key_init)
        skipped = 0
        notes.append(f"starting a new run in {workdir}")
    if given is not None:
        state = started_from(state, given)
        fresh = (
            "; its long residual connections are new" if "merges" in abstract["params"].keys() - given.keys() else ""
        )
        notes.append(f"starting from {config.init_from.file}{fresh}")

    main_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        stack.callback(loader.close)
        writer = stack.enter_context(MetricWriter(workdir, start)) if main_process else None
        stream = None if main_process else stack.enter_context(open(os.devnull, "w"))  # one process talks for all
        progress = stack.enter_context(Progress(config.total_steps, start, config.batch_size, stream=stream))
        describe(workdir, config, state, writer, progress, notes)
        finite = Finite(config.max_skipped, skipped, checkpoints, progress.note)
        profile = profiler.Profiler(config.profile if main_process else "", workdir, progress.note)
        stack.callback(profile.close)

        # --- One compiled step.
        step_shardings = (state_shardings, sharding.replicated(layout))
        compiled = jax.jit(partial(train_step, parts), donate_argnums=0, out_shardings=step_shardings)
        begin = time.monotonic()
        with jax.set_mesh(layout.mesh):
            step_fn = compiled.lower(state, frozen, batch, key_run).compile()
        progress.note(f"compiled the training step in {time.monotonic() - begin:.1f} s")

        def save(step: int) -> None:
            meta = {"next_batch": step, "shape": list(dataset.shape), "num_classes": dataset.num_classes}
            meta["skipped"] = finite.skipped
            with progress.pause():
                checkpoints.save(step, state, meta)
            saved.append(step)

        def write(step: int, scalars: Mapping[str, float]) -> None:
            if writer is not None:
                writer.write_scalars(step, scalars)

        def show_samples(step: int, path: Path) -> None:
            labels = np.resize(sampler.known_labels(dataset.num_classes), config.samples.num)
            images = generate(labels)
            if writer is not None and images.dtype == np.uint8:
                grid = image_grid(images)
                path.parent.mkdir(exist_ok=True)
                save_png(path, grid)
                writer.write_images(step, {"samples": grid})

        def generate(labels: np.ndarray, first: int = 0) -> np.ndarray:
            return sample(state["ema"], frozen, labels, config.seed, first=first)

        def evaluate(step: int, label: str) -> None:
            found = {f"{label}/{name}": x for name, x in evaluators[label](Current(state["ema"], generate))}
            scores = {name: x for name, x in found.items() if not isinstance(x, np.ndarray)}
            write(step, scores)
            if writer is not None:
                writer.write_images(step, {name: x for name, x in found.items() if name not in scores})
            progress.note("  ".join([f"step {step}", *(f"{name} {value:.4g}" for name, value in scores.items())]))
            if label == judge:
                metric = config.checkpoint.metric
                if metric not in scores:
                    raise ConfigError(
                        f"config.checkpoint.metric = {metric!r} is not found; {suggestion(metric, scores)}"
                    )
                checkpoints.score(step, scores[metric])

        # --- The loop. Metrics are read one step late, so that the device never waits for the host.
        step, pending, saved, noted = start, None, [start], 0
        stop = stack.enter_context(cli.stop_requests(progress.note))
        alive = stack.enter_context(cli.watchdog(config.watchdog))
        stopped = None
        while step < config.total_steps and not (stopped := stop(step)):
            alive()
            step += 1
            with profile.step(step):
                state, metrics = step_fn(state, frozen, batch, key_run)
                if step < config.total_steps:
                    batch = next_batch()
            profile.after(step, metrics)
            for fault in faults[noted:]:
                progress.note(f"data: {fault}")
            noted = len(faults)
            if pending is not None:
                finite(step - 1, pending)
            pending = metrics
            last = step == config.total_steps
            logging = step == 1 or step % config.log_every == 0 or last
            saving = due(step, config.checkpoint.every) or last
            saving |= judge is not None and due(step, config.evaluators[judge].every)  # else the best might not be kept
            if logging or saving:
                values = finite(step, metrics)
            if logging:
                rates = progress.report(step, shown(values))
                if rates:
                    rates |= flops.rates(work, rates["steps_per_sec"], jax.devices()[0].device_kind, jax.device_count())
                counts = {"data/bad_records": len(faults)} if config.input.max_bad_records else {}
                counts |= {"skipped_batches": finite.skipped} if config.max_skipped else {}
                write(step, values | rates | counts | {"learning_rate": float(rate(step - 1))})
            if saving:
                save(step)
            progress.update(step)
            alive(False)  # samples and scores take as long as they take
            with progress.pause():
                if due(step, config.samples.every) and not last:
                    show_samples(step, workdir / "samples" / f"{step:07d}.png")
                for label in evaluators:
                    if due(step, config.evaluators[label].every) and not last:
                        evaluate(step, label)
        alive()  # a mount that hangs while the last checkpoint is written
        if step < config.total_steps:
            if step > saved[-1]:
                finite(step, pending)
                save(step)
            checkpoints.wait()
            kept = "saved" if checkpoints.steps() else "nothing to save"
            raise cli.Stopped(
                f"{stopped}: stopped at step {step} of {config.total_steps}, {kept}; run it again to resume"
            )

        # --- The end: the last samples, the last scores, and where everything is.
        if start >= config.total_steps and (workdir / "samples.png").exists():
            progress.note(
                f"nothing to do: the checkpoint is at step {start}, config.total_steps is {config.total_steps}"
            )
        else:
            alive(False)
            for label in evaluators:
                evaluate(step, label)
            show_samples(step, workdir / "samples.png")
            alive()
        checkpoints.wait()
    if main_process:
        print(summary(workdir, checkpoints, time.monotonic() - started), flush=True)
    return state


def due(step: int, every: int) -> bool:
    """Whether something that happens `every` so many steps happens now; 0: only at the end."""
    return every > 0 and step % every == 0


class Finite:
    """The metrics of a step, fetched; and a count of the batches that were skipped because one was not finite.

    most: how many may be; one more is a NonFiniteError that names the first term. before: those of the run so far.
    """

    def __init__(self, most: int, before: int, checkpoints: Checkpoints, note: Callable[[str], None]):
        self.skipped = before
        self._most, self._checkpoints, self._note = most, checkpoints, note
        self._last = -1  # the last step that was counted: some are looked at twice

    def __call__(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        order = sorted(values, key=lambda name: (name == "loss/total", name == "grad_norm"))
        bad = [name for name in order if not_finite_ends(name) and not math.isfinite(values[name])]
        if bad and step > self._last:
            self._last = step
            self._count(f"{bad[0]} is {values[bad[0]]} at step {step}")
        return values

    def _count(self, what: str) -> None:
        self.skipped += 1
        if self.skipped <= self._most:
            self._note(f"{what}: the batch is skipped ({self.skipped} of at most {self._most})")
            return
        with contextlib.suppress(Exception):
            self._checkpoints.wait()
        last = self._checkpoints.latest()
        kept = f"the last good checkpoint is step {last}" if last else "there is no checkpoint yet"
        more = f" (more than max_skipped = {self._most})" if self._most else ""
        raise NonFiniteError(f"{what}{more}; nothing of it was saved, {kept}")


def shown(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics worth a place on the progress line: the terms as they add up, and what they weigh, <label>/loss."""
    terms = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    unweighted = {name: value for name, value in values.items() if name.endswith("/loss")}
    first = {"loss": terms.pop("total"), "objective": terms.pop("objective")}
    return first | terms | unweighted | {"grad_norm": values["grad_norm"]}


def describe(workdir: Path, config: ConfigDict, state: State, writer, progress: Progress, notes: list[str]) -> None:
    """Write down what runs: versions, parameters, config."""
    for note in notes:
        progress.note(note)
    if writer is None:
        return
    installed = versions()
    overview = parameter_overview(state["params"])
    (workdir / "versions.json").write_text(json.dumps(installed, indent=2) + "\n")
    (workdir / "parameters.txt").write_text(overview + "\n")
    writer.write_hparams(configs.flat(config.to_dict()))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"]))
    progress.note(f"{count:,} parameters on {installed['devices']} ({installed['backend']})")


def summary(workdir: Path, checkpoints: Checkpoints, seconds: float) -> str:
    """Where a person finds what the run made."""
    places = {
        "samples": workdir / "samples.png",
        "metrics": workdir / "metrics.jsonl",
        "checkpoint": checkpoints.directory / str(checkpoints.latest()),
    }
    if best := checkpoints.best_steps():
        places["best"] = checkpoints.directory / str(best[0])
    lines = [f"  {name:<11}{place}" for name, place in places.items() if place.exists()]
    return "\n".join([f"done in {duration(seconds)}", *lines, f"  TensorBoard: tensorboard --logdir {workdir}"])


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file; --config.KEY=VALUE changes a key.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of the run; made if missing.")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.launch(lambda: run(flags.FLAGS.config, flags.FLAGS.workdir), several=True)
