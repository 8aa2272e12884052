"""Train a model: python -m diversedit_jax.train --config=configs/digits.py --workdir=DIR [--config.KEY=VALUE ...]

The same command resumes a stopped run at its last checkpoint, with the same results to the bit. Ctrl-C and SIGTERM save
and exit with code 42. DIR gets config.json, versions.json, parameters.txt, metrics.jsonl and TensorBoard events,
samples/ and samples.png, checkpoints/.
"""

import contextlib
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

from diversedit_jax import conditioning, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Batch, Condition
from diversedit_jax.data import Dataset, pipeline
from diversedit_jax.errors import ConfigError, NonFiniteError
from diversedit_jax.evaluators import Current, SampleSpec
from diversedit_jax.registry import in_range, suggestion
from diversedit_jax.runs import build
from diversedit_jax.runtime import cli, files, flops, processes, workdir_lock
from diversedit_jax.runtime.metric_writer import MetricWriter
from diversedit_jax.runtime.pictures import as_pictures, image_grid, save_png
from diversedit_jax.runtime.profiler import Profiler, windows
from diversedit_jax.runtime.progress import Progress, duration
from diversedit_jax.runtime.versions import parameter_overview, versions
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.step import State, initializer, not_finite_ends, started_from, train_step


def run(config: ConfigDict, workdir: str | Path) -> State:
    """Train as `config` says, from the last checkpoint in `workdir` if there is one. Return the final state."""
    begin = time.monotonic()
    cli.silence()
    workdir = files.writable_folder(workdir)
    processes.check_shared(workdir)
    with contextlib.ExitStack() as lock:
        processes.first_alone(lambda: lock.enter_context(workdir_lock.held(workdir, say)))
        processes.agree("config", files.flat(config.to_dict()))
        with contextlib.ExitStack() as stack:
            trainer = Trainer(config, workdir, stack)
            trainer.loop(stack)
            trainer.finish()
        if jax.process_index() == 0:
            print(summary(workdir, trainer.checkpoints, time.monotonic() - begin), flush=True)
        return trainer.state


def say(line: str) -> None:
    """Print a line before there is a progress bar."""
    print(line, file=sys.stderr, flush=True)


class Trainer:
    """A run: what it trains, with what, and its state."""

    def __init__(self, config: ConfigDict, workdir: Path, stack: contextlib.ExitStack):
        """Initialise. Whatever can be refused is refused before anything compiles or is written."""
        self.config, self.workdir = config, workdir

        # 1. Components, from the config and the data set.
        dataset = build.open_data(config)
        self.experiment = experiment = build.build(config, dataset.space)
        components, layout = experiment.components, experiment.layout
        conditioning.check_guidance(config.sampler.cfg_scale, dataset.space.conditions)
        windows(config.profile)
        asked = in_range("config.samples.num", config.samples.num, 0) > 0
        self.sampler = experiment.sampler() if asked or components.objective.predicts else None
        self.judge = build.best_by(config)  # the evaluator by which checkpoints are kept
        spec = SampleSpec.of(experiment)
        self.evaluators = {
            label: configs.make("evaluators", slot, f"config.evaluators.{label}", spec)
            for label, slot in config.evaluators.items()
        }
        keeping = {name: config.checkpoint[name] for name in ("keep", "keep_every", "best", "lower")}
        self.checkpoints = Checkpoints(workdir / "checkpoints", **keeping)

        # 2. The first batch: real data, so that what is wrong with them is said now.
        self.begin = processes.number_of_first(self.checkpoints.latest() or 0)
        self.feed = Feed(config, dataset, layout, self.begin)
        stack.callback(self.feed.close)
        key_init, self.key = jax.random.split(jax.random.key(config.seed))
        init = initializer(components, self.feed.batch)
        try:
            abstract = jax.eval_shape(init, key_init)
            self.flops = build.work(experiment, abstract, self.feed.batch)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the config cannot be traced: {error}") from error

        # 3. The state: born sharded, or read back.
        shardings = sharding.shardings(abstract, layout)
        given = None if self.begin else build.starting_params(config, components.model, abstract["params"])
        notes = processes.first_alone(lambda: configs.claim(workdir, config)) or []
        self.frozen, skipped = build.frozen_weights(components.codec, layout), 0
        if self.begin:
            self.state, whole, damaged = self.checkpoints.restore_newest(sharding.placed(abstract, shardings))
            if whole != self.begin:
                self.feed.restart(whole)
            notes += [*damaged, f"resuming from step {whole} of {config.total_steps}"]
            skipped, self.begin = self.checkpoints.meta(whole).get("skipped", 0), whole
        else:
            self.state = jax.jit(init, out_shardings=shardings)(key_init)
            notes.append(f"starting a new run in {workdir}")
        if given is not None:
            self.state = started_from(self.state, given)
            fresh = ", ".join(sorted(abstract["params"].keys() - given.keys()))
            notes.append(f"starting from {config.init_from.file}" + (f"; new: {fresh}" if fresh else ""))

        # 4. Reports, and one program for all steps.
        stack.callback(self.checkpoints.close)
        self.report = Report(config, workdir, self.begin, stack)
        self.report.describe(self.state, notes)
        outputs = (shardings, sharding.replicated(layout))
        step = jax.jit(partial(train_step, components), donate_argnums=0, out_shardings=outputs)
        clock = time.monotonic()
        with jax.set_mesh(layout.mesh):
            self.step = step.lower(self.state, self.frozen, self.feed.batch, self.key).compile()
        self.report.note(f"compiled the training step in {time.monotonic() - clock:.1f} s")
        self.finite = Finite(config.max_skipped, skipped, self.checkpoints, self.report.note)
        self.saved = self.begin

    def loop(self, stack: contextlib.ExitStack) -> None:
        """Take all steps. Metrics are read one step late, so that the devices never wait for the host."""
        config, report = self.config, self.report
        number, pending, stopped = self.begin, None, None
        stop = stack.enter_context(cli.stop_requests(report.note))
        self.alive = stack.enter_context(cli.watchdog(config.watchdog))
        while number < config.total_steps and not (stopped := stop(number)):
            self.alive()
            number += 1
            with report.profile.step(number):
                self.state, metrics = self.step(self.state, self.frozen, self.feed.batch, self.key)
                if number < config.total_steps:
                    self.feed.advance()
            report.profile.after(number, metrics)
            for fault in self.feed.new_faults():
                report.note(f"data: {fault}")
            if pending is not None:
                self.finite(number - 1, pending)
            pending, last = metrics, number == config.total_steps
            logging = number == 1 or number % config.log_every == 0 or last
            saving = due(number, config.checkpoint.every) or last
            saving |= self.judge is not None and due(number, config.evaluators[self.judge].every)
            values = self.finite(number, metrics) if logging or saving else None
            if logging:
                self.log(number, values)
            if saving:
                self.save(number)
            report.progress.update(number)
            if not last:
                self.look(number)
        self.alive()  # a mount that hangs while the last checkpoint is written
        if number < config.total_steps:
            if number > self.saved:
                self.finite(number, pending)
                self.save(number)
            self.checkpoints.wait()
            kept = "saved" if self.checkpoints.steps() else "nothing to save"
            raise cli.Stopped(
                f"{stopped}: stopped at step {number} of {config.total_steps}, {kept}; run it again to resume"
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step, and the rates since the last time."""
        config = self.config
        rates = self.report.progress.report(step, shown(values))
        if rates:
            rates |= flops.rates(self.flops, rates["steps_per_sec"], jax.devices()[0].device_kind, jax.device_count())
        counts = {"data/bad_records": len(self.feed.faults)} if config.input.max_bad_records else {}
        counts |= {"skipped_batches": self.finite.skipped} if config.max_skipped else {}
        (_, main), *others = self.experiment.rates.items()
        learning = {"learning_rate": main} | {f"learning_rate/{label}": rate for label, rate in others}
        learning = {name: float(rate(step - 1)) for name, rate in learning.items()}
        self.report.scalars(step, values | rates | counts | learning)

    def save(self, step: int) -> None:
        """Begin to save the state."""
        meta = {"next_batch": step, "skipped": self.finite.skipped, **build.to_json(self.experiment.space)}
        with self.report.progress.pause():
            self.checkpoints.save(step, self.state, meta)
        self.saved = step

    def look(self, step: int) -> None:
        """Draw the samples and run the evaluators that are due at a step. They take as long as they take."""
        self.alive(False)
        with self.report.progress.pause():
            if due(step, self.config.samples.every):
                self.show(step, self.workdir / "samples" / f"{step:07d}.png")
            for label in self.evaluators:
                if due(step, self.config.evaluators[label].every):
                    self.evaluate(step, label)

    def draw(self, conditions: Condition, first: int = 0) -> np.ndarray:
        """Draw samples of the EMA network. ConfigError if its objective does not say how."""
        sampler = self.sampler or self.experiment.sampler()
        return sampler(self.state["ema"], self.frozen, conditions, self.config.seed, first=first)

    def show(self, step: int, path: Path) -> None:
        """Draw and write a grid of samples, if any are asked for."""
        if num := self.config.samples.num:
            self.report.samples(step, path, self.draw(self.experiment.conditions(None, num, self.config.seed)))

    def evaluate(self, step: int, label: str) -> None:
        """Run an evaluator, and write what it finds."""
        learned = {"params": self.state["ema"]} | {name: self.state[name] for name in ("losses", "objective", "memory")}
        found = dict(self.evaluators[label](Current(learned, self.frozen, self.draw)))
        images = {f"{label}/{name}": x for name, x in found.items() if isinstance(x, np.ndarray)}
        scores = {f"{label}/{name}": x for name, x in found.items() if not isinstance(x, np.ndarray)}
        self.report.scalars(step, scores)
        self.report.images(step, images)
        self.report.note("  ".join([f"step {step}", *(f"{name} {value:.4g}" for name, value in scores.items())]))
        if label == self.judge:
            metric = self.config.checkpoint.metric
            if metric not in scores:
                raise ConfigError(f"config.checkpoint.metric = {metric!r} is not found; {suggestion(metric, scores)}")
            self.checkpoints.score(step, scores[metric])

    def finish(self) -> None:
        """Compute the last scores, draw the last samples, wait for the last checkpoint."""
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


class Feed:
    """The batches of a run, on the devices. `batch` is the next one.

    Call `advance` as soon as a step is dispatched: it reads and transfers while the devices compute.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, layout: sharding.Layout, begin: int):
        self.faults: list[str] = []  # of records that could not be read
        self._told, self._loader = 0, None
        self._config, self._dataset, self._layout = config, dataset, layout
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

    def new_faults(self) -> list[str]:
        """The faults since the last call."""
        told, self._told = self._told, len(self.faults)
        return self.faults[told:]

    def close(self) -> None:
        """End the threads and processes that read."""
        if self._loader is not None:
            self._loader.close()


class Report:
    """Metrics and images in files, lines on the terminal. Of several processes only the first writes."""

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
        files.write_json(self.workdir / "versions.json", installed)
        files.write_text(self.workdir / "parameters.txt", parameter_overview(state["params"]) + "\n")
        self.writer.write_hparams(files.flat(self.config.to_dict()))
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


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now. 0: only at the end."""
    return every > 0 and step % every == 0


class Finite:
    """Fetches the metrics of a step, and counts the batches that were skipped because one is not finite.

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
