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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from diversedit_jax import conditioning, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Batch, Condition
from diversedit_jax.data import Dataset, pipeline
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.evaluators import Current, SampleSpec
from diversedit_jax.registry import suggestion
from diversedit_jax.runs import build
from diversedit_jax.runs.build import Experiment
from diversedit_jax.runtime import cli, flops, processes, workdir_lock
from diversedit_jax.runtime.files import writable_folder
from diversedit_jax.runtime.metric_writer import MetricWriter
from diversedit_jax.runtime.pictures import as_pictures, image_grid, save_png
from diversedit_jax.runtime.profiler import Profiler, windows
from diversedit_jax.runtime.progress import Progress, duration
from diversedit_jax.runtime.versions import parameter_overview, versions
from diversedit_jax.sampling.sampler import Sampler
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.step import State, initializer, not_finite_ends, started_from, train_step


def run(config: ConfigDict, workdir: str | Path) -> State:
    """Train as `config` says, from the last checkpoint in `workdir` if there is one; returns the final state."""
    cli.silence()
    workdir = writable_folder(workdir)
    processes.check_shared(workdir)
    with contextlib.ExitStack() as stack:  # no other run writes there meanwhile
        processes.first_alone(lambda: stack.enter_context(workdir_lock.held(workdir, say)))
        return train(config, workdir)


def say(line: str) -> None:
    """A line before there is a progress bar."""
    print(line, file=sys.stderr, flush=True)


def train(config: ConfigDict, workdir: Path) -> State:
    """A run from its start, or from its last checkpoint, to its end."""
    begin = time.monotonic()
    processes.agree("config", configs.flat(config.to_dict()))
    with contextlib.ExitStack() as stack:
        trainer = start(config, workdir, stack)
        trainer.loop(stack)
        trainer.finish()
    if jax.process_index() == 0:
        print(summary(workdir, trainer.checkpoints, time.monotonic() - begin), flush=True)
    return trainer.state


def start(config: ConfigDict, workdir: Path, stack: contextlib.ExitStack) -> "Trainer":
    """Initialise a run. Whatever can be refused is refused before anything compiles or is written."""
    # 1. Components, from the config and the data set.
    dataset = build.open_data(config)
    experiment = build.build(config, dataset.space)
    conditioning.check_guidance(config.sampler.cfg_scale, dataset.space.conditions)
    windows(config.profile)
    sampler, judge = experiment.sampler(), build.best_by(config)
    spec = SampleSpec.of(experiment)
    evaluators = {
        label: configs.make("evaluators", slot, f"config.evaluators.{label}", spec)
        for label, slot in config.evaluators.items()
    }
    keeping = {name: config.checkpoint[name] for name in ("keep", "keep_every", "best", "lower")}
    checkpoints = Checkpoints(workdir / "checkpoints", **keeping)

    # 2. The first batch: real data, so that what is wrong with them is said now.
    begin = processes.number_of_first(checkpoints.latest() or 0)
    feed = Feed(config, dataset, experiment.layout, begin)
    stack.callback(feed.close)
    key_init, key_run = jax.random.split(jax.random.key(config.seed))
    init = initializer(experiment.components, feed.batch)
    try:
        abstract = jax.eval_shape(init, key_init)
        work = build.work(experiment, abstract, feed.batch)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the config cannot be traced: {error}") from error

    # 3. The state: born sharded, or read back.
    shardings = sharding.shardings(abstract, experiment.layout)
    given = None if begin else build.starting_params(config, experiment.components.model, abstract["params"])
    notes = processes.first_alone(lambda: configs.claim(workdir, config)) or []
    frozen = build.frozen_weights(experiment.components.codec, experiment.layout)
    if begin:
        state, whole, damaged = checkpoints.restore_newest(sharding.placed(abstract, shardings))
        if whole != begin:
            feed.restart(whole)
        notes += [*damaged, f"resuming from step {whole} of {config.total_steps}"]
        skipped, begin = checkpoints.meta(whole).get("skipped", 0), whole
    else:
        state, skipped = jax.jit(init, out_shardings=shardings)(key_init), 0
        notes.append(f"starting a new run in {workdir}")
    if given is not None:
        state = started_from(state, given)
        fresh = sorted(abstract["params"].keys() - given.keys())
        notes.append(f"starting from {config.init_from.file}" + (f"; new: {', '.join(fresh)}" if fresh else ""))

    # 4. Reports, and one program for all steps.
    stack.callback(checkpoints.close)
    report = Report(config, workdir, begin, stack)
    report.describe(state, notes)
    outputs = (shardings, sharding.replicated(experiment.layout))
    step = jax.jit(partial(train_step, experiment.components), donate_argnums=0, out_shardings=outputs)
    clock = time.monotonic()
    with jax.set_mesh(experiment.layout.mesh):
        compiled = step.lower(state, frozen, feed.batch, key_run).compile()
    report.note(f"compiled the training step in {time.monotonic() - clock:.1f} s")
    finite = Finite(config.max_skipped, skipped, checkpoints, report.note)
    parts = {"config": config, "workdir": workdir, "experiment": experiment, "feed": feed, "checkpoints": checkpoints}
    parts |= {"evaluators": evaluators, "judge": judge, "sampler": sampler, "work": work}
    return Trainer(
        **parts, compiled=compiled, frozen=frozen, key=key_run, report=report, finite=finite, state=state, begin=begin
    )


class Feed:
    """The batches of a run, on the devices. `batch` is the next one.

    `advance` is called as soon as a step is dispatched: it reads and transfers while the devices compute.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, layout: sharding.Layout, begin: int):
        self.faults: list[str] = []  # of records that could not be read
        self._config, self._dataset, self._layout = config, dataset, layout
        self._loader: Any = None
        self.restart(begin)

    def restart(self, begin: int) -> None:
        """Go to the batch of a step."""
        self.close()
        config = self._config
        options = {"rows": sharding.rows(self._layout, config.batch_size), "report": self.faults.append}
        options |= configs.keywords(config.input, "config.input", pipeline.batches)
        self._loader = pipeline.batches(self._dataset, config.batch_size, config.seed, begin, **options)
        self.advance()

    def advance(self) -> None:
        """Read the next batch."""
        self.batch: Batch = sharding.from_rows(next(self._loader), self._layout, self._config.batch_size)

    def close(self) -> None:
        """End the threads and processes that read."""
        if self._loader is not None:
            self._loader.close()


class Report:
    """What a run tells: metrics and images in files, lines on the terminal. Of several processes one talks for all."""

    def __init__(self, config: ConfigDict, workdir: Path, begin: int, stack: contextlib.ExitStack):
        self.config, self.workdir = config, workdir
        main = jax.process_index() == 0
        self.writer = stack.enter_context(MetricWriter(workdir, begin)) if main else None
        stream = None if main else stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115 (on the stack)
        self.progress = stack.enter_context(Progress(config.total_steps, begin, config.batch_size, stream=stream))
        self.note = self.progress.note
        self.profile = Profiler(config.profile if main else "", workdir, self.note)
        stack.callback(self.profile.close)

    def describe(self, state: State, notes: list[str]) -> None:
        """Write down what runs: versions, parameters, config."""
        for note in notes:
            self.note(note)
        if self.writer is None:
            return
        installed = versions()
        (self.workdir / "versions.json").write_text(json.dumps(installed, indent=2) + "\n")
        (self.workdir / "parameters.txt").write_text(parameter_overview(state["params"]) + "\n")
        self.writer.write_hparams(configs.flat(self.config.to_dict()))
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"]))
        self.note(f"{count:,} parameters on {installed['devices']} ({installed['backend']})")

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers."""
        if self.writer is not None:
            self.writer.write_scalars(step, scalars)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images."""
        if self.writer is not None:
            self.writer.write_images(step, images)

    def samples(self, step: int, path: Path, images: np.ndarray) -> None:
        """Write a grid of samples, where they are images."""
        if self.writer is not None and images.dtype == np.uint8:
            grid = image_grid(as_pictures(images))
            path.parent.mkdir(exist_ok=True)
            save_png(path, grid)
            self.images(step, {"samples": grid})


@dataclass
class Trainer:
    """A run in progress: what it trains, with what, and its state."""

    config: ConfigDict
    workdir: Path
    experiment: Experiment
    feed: Feed
    checkpoints: Checkpoints
    evaluators: Mapping[str, Callable]
    judge: str | None  # the evaluator by which checkpoints are kept
    sampler: Sampler
    work: int  # FLOPs of a step
    compiled: jax.stages.Compiled
    frozen: Any
    key: jax.Array
    report: Report
    finite: "Finite"
    state: State
    begin: int  # the step at which this process began
    saved: int = field(init=False)

    def __post_init__(self):
        self.saved = self.begin

    def loop(self, stack: contextlib.ExitStack) -> None:
        """All steps. Metrics are read one step late, so that the devices never wait for the host."""
        config, report = self.config, self.report
        step, pending, noted = self.begin, None, 0
        stop = stack.enter_context(cli.stop_requests(report.note))
        self.alive = stack.enter_context(cli.watchdog(config.watchdog))
        stopped = None
        while step < config.total_steps and not (stopped := stop(step)):
            self.alive()
            step += 1
            with report.profile.step(step):
                self.state, metrics = self.compiled(self.state, self.frozen, self.feed.batch, self.key)
                if step < config.total_steps:
                    self.feed.advance()
            report.profile.after(step, metrics)
            for fault in self.feed.faults[noted:]:
                report.note(f"data: {fault}")
            noted = len(self.feed.faults)
            if pending is not None:
                self.finite(step - 1, pending)
            pending = metrics
            last = step == config.total_steps
            logging = step == 1 or step % config.log_every == 0 or last
            saving = due(step, config.checkpoint.every) or last
            saving |= self.judge is not None and due(step, config.evaluators[self.judge].every)
            values = self.finite(step, metrics) if logging or saving else None
            if logging:
                self.log(step, values)
            if saving:
                self.save(step)
            report.progress.update(step)
            if not last:
                self.look(step)
        self.alive()  # a mount that hangs while the last checkpoint is written
        if step < config.total_steps:
            if step > self.saved:
                self.finite(step, pending)
                self.save(step)
            self.checkpoints.wait()
            kept = "saved" if self.checkpoints.steps() else "nothing to save"
            raise cli.Stopped(
                f"{stopped}: stopped at step {step} of {config.total_steps}, {kept}; run it again to resume"
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step, and the rates since the last time."""
        config = self.config
        rates = self.report.progress.report(step, shown(values))
        if rates:
            rates |= flops.rates(self.work, rates["steps_per_sec"], jax.devices()[0].device_kind, jax.device_count())
        counts = {"data/bad_records": len(self.feed.faults)} if config.input.max_bad_records else {}
        counts |= {"skipped_batches": self.finite.skipped} if config.max_skipped else {}
        (_, main), *others = self.experiment.rates.items()
        learning = {"learning_rate": float(main(step - 1))}
        learning |= {f"learning_rate/{label}": float(rate(step - 1)) for label, rate in others}
        self.report.scalars(step, values | rates | counts | learning)

    def save(self, step: int) -> None:
        """Begin to save the state."""
        meta = {"next_batch": step, "skipped": self.finite.skipped, **build.to_json(self.experiment.space)}
        with self.report.progress.pause():
            self.checkpoints.save(step, self.state, meta)
        self.saved = step

    def look(self, step: int) -> None:
        """Samples and scores that are due at a step. They take as long as they take."""
        self.alive(False)
        with self.report.progress.pause():
            if due(step, self.config.samples.every):
                self.show(step, self.workdir / "samples" / f"{step:07d}.png")
            for label in self.evaluators:
                if due(step, self.config.evaluators[label].every):
                    self.evaluate(step, label)

    def draw(self, conditions: Condition, first: int = 0) -> np.ndarray:
        """Samples of the EMA network."""
        return self.sampler(self.state["ema"], self.frozen, conditions, self.config.seed, first=first)

    def show(self, step: int, path: Path) -> None:
        """Draw and write a grid of samples."""
        self.report.samples(
            step, path, self.draw(self.experiment.conditions(None, self.config.samples.num, self.config.seed))
        )

    def evaluate(self, step: int, label: str) -> None:
        """Run an evaluator, and write what it finds."""
        learned = {"params": self.state["ema"]} | {name: self.state[name] for name in ("losses", "objective", "memory")}
        current = Current(learned, self.frozen, self.draw)
        found = {f"{label}/{name}": x for name, x in self.evaluators[label](current)}
        scores = {name: x for name, x in found.items() if not isinstance(x, np.ndarray)}
        self.report.scalars(step, scores)
        self.report.images(step, {name: x for name, x in found.items() if name not in scores})
        self.report.note("  ".join([f"step {step}", *(f"{name} {value:.4g}" for name, value in scores.items())]))
        if label == self.judge:
            metric = self.config.checkpoint.metric
            if metric not in scores:
                raise ConfigError(f"config.checkpoint.metric = {metric!r} is not found; {suggestion(metric, scores)}")
            self.checkpoints.score(step, scores[metric])

    def finish(self) -> None:
        """The last scores and the last samples."""
        total, path = self.config.total_steps, self.workdir / "samples.png"
        if self.begin >= total and path.exists():
            self.report.note(f"nothing to do: the checkpoint is at step {self.begin}, config.total_steps is {total}")
        else:
            self.alive(False)
            for label in self.evaluators:
                self.evaluate(total, label)
            self.show(total, path)
            self.alive()
        self.checkpoints.wait()


def due(step: int, every: int) -> bool:
    """Whether something that happens `every` so many steps happens now; 0: only at the end."""
    return every > 0 and step % every == 0


class Finite:
    """The metrics of a step, fetched; and a count of the batches that were skipped because one was not finite.

    most: how many may be skipped; one more is a NonFiniteError that names the first term. before: those of the run so
    far.
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
    """The metrics for the progress line: the terms as they add up, and each loss before its weight (<label>/loss)."""
    terms = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    unweighted = {name: value for name, value in values.items() if name.endswith("/loss")}
    first = {"loss": terms.pop("total"), "objective": terms.pop("objective")}
    return first | terms | unweighted | {"grad_norm": values["grad_norm"]}


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
