"""Train a model, or go on with a run that was stopped.

    python -m diversedit_jax.train --config=digits --workdir=runs/mine
    python -m diversedit_jax.train --config=sit:xl2 --workdir=DIR --config.data.data_dir=LATENTS
    python -m diversedit_jax.train --config=mine.py --workdir=DIR --config.optim.learning_rate=3e-4

--config: a recipe of the package (below) or a file, with a variant after a colon. --config.KEY=VALUE sets any key;
--explain says what they mean, --dry_run what a run would do.
The same command resumes a stopped run at its last checkpoint, with the same results to the bit. Ctrl-C and SIGTERM save
and exit with code 42. Files in DIR: config.json, versions.json, parameters.txt, metrics.jsonl, TensorBoard events,
samples.png (videos: also samples.gif), samples/, checkpoints/. When it ends or stops it draws curves.png, and
report.html: one page with samples, curves, scores, config and the next commands.
"""

import contextlib
import itertools
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from diversedit_jax import conditioning, network, sharding
from diversedit_jax import config as configs
from diversedit_jax.api import Batch, Condition
from diversedit_jax.data import Dataset, pipeline
from diversedit_jax.errors import CheckpointError, ConfigError, NonFiniteError
from diversedit_jax.evaluators import Current, SampleSpec
from diversedit_jax.registry import suggestion
from diversedit_jax.runs import build, explain, starting
from diversedit_jax.runs.check import check
from diversedit_jax.runs.dry_run import Planned, report, with_data
from diversedit_jax.runtime import cli, files, flops, loggers, pictures, processes, profiler, versions, workdir_lock
from diversedit_jax.runtime.metric_writer import MetricWriter
from diversedit_jax.runtime.progress import Progress, done, say
from diversedit_jax.training.checkpoint import Checkpoints
from diversedit_jax.training.step import State, initializer, must_be_finite, started_from, train_step


def run(config: ConfigDict, workdir: str | Path) -> State:
    """Train as `config` says, from the last checkpoint in `workdir` if there is one. Return the final state."""
    begin = time.monotonic()
    cli.silence()
    check(config)
    workdir = files.writable_folder(workdir)
    processes.check_shared(workdir)
    held = workdir_lock.held(workdir, say)
    with contextlib.ExitStack() as lock:
        check_lock = processes.first_alone(lambda: lock.enter_context(held)) or (lambda: None)
        processes.agree("config", files.flat(config.to_dict()))
        with contextlib.ExitStack() as stack:
            trainer = Trainer(config, workdir, stack, check_lock)
            trainer.loop(stack)
            trainer.finish()
        if jax.process_index() == 0:
            done(time.monotonic() - begin, results(workdir, trainer.checkpoints))
        return trainer.state


class Plan:
    """What a run will do: its components, its first batch, the shapes of its state."""

    def __init__(self, config: ConfigDict, workdir: Path, stack: contextlib.ExitStack):
        """Find the errors of the config and the data. Nothing compiles, and nothing is written."""
        self.config, self.workdir = config, workdir

        # 1. Components, from the config and the data set.
        processes.first_alone(partial(loggers.check_installed, config.loggers))
        self.dataset = dataset = build.open_data(config)
        self.experiment = experiment = build.resident(build.build(config, dataset.space), dataset)
        components, layout = experiment.components, experiment.layout
        learns_null = components.objective.learns_null
        with configs.named("config.sampler", config.sampler):
            conditioning.check_guidance(config.sampler.cfg_scale, dataset.space.conditions, learns_null)
        sampled = config.samples.num or components.objective.predicts
        self.sampler = experiment.sampler() if sampled else None
        self.judge = build.best_by(config)  # label of the evaluator whose scores choose the best checkpoints
        spec = SampleSpec.of(experiment)
        self.evaluators = {
            label: configs.make("evaluators", slot, f"config.evaluators.{label}", spec)
            for label, slot in config.evaluators.items()
        }
        keeping = {name: config.checkpoint[name] for name in ("keep", "keep_every", "best", "lower")}
        self.checkpoints = Checkpoints(workdir / "checkpoints", **keeping)

        # 2. The first batch. It holds real data, so that errors in the data show now.
        self.begin = processes.number_of_first(self.checkpoints.latest() or 0)
        self.faults: list[str] = []  # a line for each record that could not be read and was replaced
        self.feed_from = partial(batches, config, dataset, layout, self.faults.append)
        self.feed = self.feed_from(self.begin)
        stack.callback(lambda: self.feed.close())
        self.batch = next(self.feed)
        self.key_init, self.key = jax.random.split(jax.random.key(config.seed))
        self.init = initializer(components, self.batch)
        try:
            self.abstract = jax.eval_shape(self.init, self.key_init)
            self.flops = build.work(experiment, self.abstract, self.batch)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the config cannot be traced: {type(error).__name__}: {error}") from error

        self.before = self.last_meta()
        self.inputs = self.same_inputs(build.inputs(config, dataset), self.before)

    def last_meta(self) -> dict[str, Any]:
        """The meta of the last checkpoint; {} without one, or if it is damaged: an older one is restored then."""
        with contextlib.suppress(CheckpointError):
            return self.checkpoints.meta(self.begin) if self.begin else {}
        return {}

    def same_inputs(self, inputs: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """`inputs`, if they are those in the meta `before`, as far as both are known. ConfigError if not."""
        remedy = "give the data and weights that it was trained with, or a new workdir"
        what, known = f"{self.workdir} holds a run", before.get("inputs", inputs)
        files.check_same(what, known, inputs, remedy, lambda key, old, new: None in (old, new))
        return inputs


class Trainer(Plan):
    """A run: its plan, its state, and the steps of its training."""

    def __init__(self, config: ConfigDict, workdir: Path, stack: contextlib.ExitStack, check_lock: Callable[[], None]):
        """Initialise, or restore."""
        super().__init__(config, workdir, stack)
        self.check_lock = check_lock
        components, layout, abstract = self.experiment.components, self.experiment.layout, self.abstract

        # 3. The state: initialised on its devices, or restored.
        shardings = sharding.shardings(abstract, layout)
        given = None if self.begin else starting.start(self.experiment, abstract["params"])
        notes = processes.first_alone(lambda: configs.claim(workdir, config, self.before.get("config"))) or []
        self.frozen, self.skipped = build.frozen_weights(components.codec, layout), 0
        if self.begin:
            self.state, whole, damaged = self.checkpoints.restore_newest(sharding.placed(abstract, shardings))
            if whole != self.begin:
                self.feed.close()
                self.feed = self.feed_from(whole)
                self.batch = next(self.feed)
            notes += [*damaged, f"resuming from step {whole} of {config.total_steps}"]
            if surplus := ", ".join(map(str, self.checkpoints.surplus())):
                notes.append(f"config.checkpoint keeps fewer steps than before: the next save removes {surplus}")
            self.skipped, self.begin = self.checkpoints.meta(whole).get("skipped", 0), whole
        else:
            self.state = jax.jit(self.init, out_shardings=shardings)(self.key_init)
            notes.append(f"starting a new run in {workdir}")
        if given is not None:
            self.state = started_from(self.state, given.params)
            notes += given.told

        # 4. Reports.
        stack.callback(self.checkpoints.close)
        self.open_reports(stack)
        self.describe([*notes, build.found(config, self.dataset)])

        # 5. One program for all steps. It compiles when training begins.
        outputs = (shardings, sharding.replicated(layout))
        self.step = jax.jit(partial(train_step, components), donate_argnums=0, out_shardings=outputs)
        self.saved = self.fetched = self.begin  # the last steps of which the state was saved, the metrics fetched

    def open_reports(self, stack: contextlib.ExitStack) -> None:
        """Open the progress bar, metrics, loggers and profiles. Of several processes only the first writes."""
        config, main = self.config, jax.process_index() == 0
        stream = None if main else stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115 (on the stack)
        kind = self.experiment.space.kind
        progress = Progress(config.total_steps, self.begin, config.batch_size, kind, stream=stream)
        self.progress = stack.enter_context(progress)
        self.note = self.progress.note
        self.writer = None
        if main:
            others = loggers.Loggers(config.loggers, config.to_dict(), self.workdir, self.note)
            self.writer = stack.enter_context(MetricWriter(self.workdir, self.begin, stack.enter_context(others)))
        self.profile = profiler.Profiler(config.profile if main else "", self.workdir, self.note)
        stack.callback(self.profile.close)

    def describe(self, notes: list[str]) -> None:
        """Write down what runs: versions, parameters, config."""
        for note in notes:
            self.note(note)
        if self.writer is None:
            return
        params, installed = self.state["params"], versions.versions()
        files.write_json(self.workdir / "versions.json", installed)
        files.write_text(self.workdir / "parameters.txt", versions.parameter_overview(params) + "\n")
        self.writer.write_hparams(files.flat(self.config.to_dict()))
        if said := slow_average(self.config.ema_decay, self.config.total_steps):
            self.note(said)
        self.note(f"{versions.parameter_count(params):,} parameters on {installed['devices']} ({installed['backend']})")

    def compile(self) -> None:
        """Compile the program of a step."""
        clock = time.monotonic()
        with jax.set_mesh(self.experiment.layout.mesh):
            self.step = self.step.lower(self.state, self.frozen, self.batch, self.key).compile()
        self.note(f"compiled the training step in {time.monotonic() - clock:.1f} s")

    def loop(self, stack: contextlib.ExitStack) -> None:
        """Take all steps. Metrics are read one step late, so that the devices never wait for the host."""
        config = self.config
        number, pending, faults = self.begin, None, 0
        if number < config.total_steps:
            self.compile()
        self.stop = stack.enter_context(cli.stop_requests(self.note))
        self.alive = stack.enter_context(cli.watchdog(config.watchdog))
        if 0 < number < config.total_steps:
            with contextlib.suppress(cli.Interrupted):
                self.look(number)  # what the run had no time for when it was stopped
        while number < config.total_steps and not self.stop():
            self.alive()
            number += 1
            last = number == config.total_steps
            with self.profile.step(number):
                self.state, metrics = self.step(self.state, self.frozen, self.batch, self.key)
                if not last:
                    self.batch = next(self.feed)  # read and transferred while the devices compute
            self.profile.after(number, metrics)
            for fault in self.faults[faults:]:
                self.note(f"data: {fault}")
            faults = len(self.faults)
            if pending is not None:
                self.fetch(number - 1, pending)
            pending = metrics
            logging = number == 1 or number % config.log_every == 0 or last
            saving = due(number, config.checkpoint.every) or last
            saving |= self.judge is not None and due(number, config.evaluators[self.judge].every)  # it may be the best
            values = self.fetch(number, metrics) if logging or saving else None
            if logging:
                self.log(number, values)
            if saving:
                self.save(number)
            self.progress.update(number)
            if not last:
                with contextlib.suppress(cli.Interrupted):
                    self.look(number)
        self.alive()  # watches the last save, too: its mount may hang
        if number < config.total_steps:
            if number > self.saved:
                self.fetch(number, pending)
                self.save(number)
            self.stopped(number)

    def stopped(self, step: int) -> NoReturn:
        """End the run, which has stopped at a step, when its checkpoint is complete."""
        self.checkpoints.wait()
        self.report(step)
        kept, total = "saved" if self.checkpoints.steps() else "nothing to save", self.config.total_steps
        raise cli.Stopped(f"{self.stop()}: stopped at step {step} of {total}, {kept}; run it again to resume")

    def fetch(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float]:
        """The metrics of a step. If a loss is not finite, its batch was skipped: count it, or raise NonFiniteError."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        order = sorted(values, key=lambda name: (name == "loss/total", name == "grad_norm"))
        bad = [name for name in order if must_be_finite(name) and not math.isfinite(values[name])]
        seen, self.fetched = step <= self.fetched, step
        if not bad or seen:  # some steps are fetched twice
            return values
        self.skipped += 1
        said, most = f"{bad[0]} is {values[bad[0]]} at step {step}", self.config.max_skipped
        if self.skipped <= most:
            self.note(f"{said}: the batch is skipped ({self.skipped} of at most {most})")
            return values
        with contextlib.suppress(Exception):
            self.checkpoints.wait()
        last = self.checkpoints.latest()
        kept = f"the last good checkpoint is step {last}" if last else "there is no checkpoint yet"
        more = f" (more than max_skipped = {most})" if most else ""
        raise NonFiniteError(f"{said}{more}; nothing of it was saved, {kept}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step, and the rates since the last time."""
        self.check_lock()
        rates = self.progress.report(step, shown(values))
        if rates:
            rates |= flops.rates(self.flops, rates["steps_per_sec"], jax.devices()[0].device_kind, jax.device_count())
        counts = {"data/bad_records": len(self.faults)} if self.config.input.max_bad_records else {}
        counts |= {"skipped_batches": self.skipped} if self.config.max_skipped else {}
        (_, main), *others = self.experiment.rates.items()
        learning = {"learning_rate": main} | {f"learning_rate/{label}": rate for label, rate in others}
        learning = {name: float(rate(step - 1)) for name, rate in learning.items()}
        if self.writer is not None:
            self.writer.write_scalars(step, values | rates | counts | learning)

    def save(self, step: int) -> None:
        """Start to save the state."""
        self.check_lock()
        meta = {
            "next_batch": step,
            "skipped": self.skipped,
            "inputs": self.inputs,
            "config": self.config.to_dict(),
            **build.to_json(self.experiment.space),
        }
        with self.progress.pause():
            self.checkpoints.save(step, self.state, meta)
        self.saved = step

    def look(self, step: int, last: bool = False) -> bool:
        """Draw the samples and run the evaluators that are due at a step, for as long as they take.

        last: all are due.
        Returns whether there was anything to do. Nothing is done again that was done before this step was restored.
        """
        self.alive(False)
        config, again = self.config, step == self.begin
        known, path = self.writer.known if self.writer and again else (), self.picture(step)
        jobs = [  # (interval, whether it is done, what to do)
            (slot.every, any(name.startswith(f"{label}/") for name in known), partial(self.evaluate, step, label))
            for label, slot in config.evaluators.items()
        ]
        if config.samples.num and self.experiment.components.codec.decode is not None:
            jobs.insert(0, (config.samples.every, again and path.exists(), partial(self.show, step, last)))
        todo = [job for every, done, job in jobs if (last or due(step, every)) and not processes.number_of_first(done)]
        with self.progress.pause():
            for job in todo:
                job()
        return bool(todo)

    def picture(self, step: int) -> Path:
        """The file of the samples of a step."""
        return self.workdir / "samples" / f"{step:07d}.png"

    def draw(self, conditions: Condition, first: int = 0) -> np.ndarray:
        """Draw samples of the EMA network. ConfigError if its objective does not say how."""
        sampler = self.sampler or self.experiment.sampler()
        return sampler(self.state["ema"], self.frozen, conditions, self.config.seed, first=first, between=self.go_on)

    def go_on(self) -> None:
        """Raise Interrupted if the run is to stop: it saves first, and computes samples and scores when it resumes."""
        if self.stop():
            raise cli.Interrupted

    def show(self, step: int, last: bool) -> None:
        """Draw samples, and write a grid of them, at the end also as samples.png. Of videos also as GIF."""
        config, path = self.config, self.picture(step)
        y = self.experiment.conditions(None, config.samples.num, config.seed)
        drawn = self.draw(y)
        self.check_lock()
        if self.writer is None:
            return
        grid = pictures.picture(drawn, self.experiment.named(y), self.experiment.space.video)
        self.writer.write_images(step, {"samples": grid.still})
        if grid.moving is not None:
            self.writer.write_moving(step, {"samples_moving": grid.moving})
        path.parent.mkdir(exist_ok=True)
        for place in [self.workdir / "samples.png"] * last + [path]:  # `path` shows that the step is done
            pictures.save(place, grid)

    def evaluate(self, step: int, label: str) -> None:
        """Run an evaluator, and write its results."""
        learned = {"params": self.state["ema"]} | {name: self.state[name] for name in ("losses", "objective", "memory")}
        found = dict(self.evaluators[label](Current(learned, self.frozen, self.draw)))
        self.check_lock()
        images = {f"{label}/{name}": x for name, x in found.items() if isinstance(x, np.ndarray)}
        scores = {f"{label}/{name}": x for name, x in found.items() if not isinstance(x, np.ndarray)}
        if label == self.judge:
            metric = self.config.checkpoint.metric
            if metric not in scores:
                raise ConfigError(f"config.checkpoint.metric = {metric!r} is not found; {suggestion(metric, scores)}")
            self.checkpoints.score(step, scores[metric])
        if self.writer is not None:
            self.writer.write_images(step, images)
            self.writer.write_scalars(step, scores)  # at the end: they show that the evaluator is done
        self.note("  ".join([f"step {step}", *(f"{name} {value:.4g}" for name, value in scores.items())]))

    def finish(self) -> None:
        """Draw the last samples, compute the last scores, wait for the last checkpoint."""
        total = self.config.total_steps
        step = max(self.begin, total)
        try:
            if not self.look(step, last=True) and self.begin >= total:
                self.note(f"nothing to do: the checkpoint is at step {step}, config.total_steps is {total}")
        except cli.Interrupted:
            self.stopped(step)
        self.alive()
        self.checkpoints.wait()
        self.report(step)

    def report(self, step: int) -> None:
        """Draw curves.png and report.html, when all else is saved. That takes a second; an error is noted only."""
        if self.writer is None:
            return
        given = sys.argv[1:] if Path(sys.argv[0]).absolute() == Path(__file__) else None
        command = None if given is None else shlex.join(["python", "-m", "diversedit_jax.train", *given])
        try:
            from diversedit_jax.analysis import run_report  # loads matplotlib, which the training does not need

            self.check_lock()
            count, kind = versions.parameter_count(self.state["params"]), self.experiment.space.kind
            facts = run_report.Facts(self.config, step, count, command, kind)
            run_report.write(self.workdir, facts)
        except Exception as error:
            self.note(f"no report: {cli.reason(error)}")


def batches(
    config: ConfigDict, dataset: Dataset, layout: sharding.Layout, report: Callable[[str], None], begin: int
) -> Iterator[Batch]:
    """The batches of a run from step `begin` on, on the devices. report: gets a line for each replaced record."""
    options = configs.keywords(config.input, "config.input", pipeline.batches)
    options |= {"rows": sharding.rows(layout, config.batch_size), "report": report}
    with configs.named("config.input", options):
        loader = pipeline.batches(dataset, config.batch_size, config.seed, begin, **options)
    with contextlib.closing(loader):
        for rows in loader:
            yield sharding.from_rows(rows, layout, config.batch_size)


def due(step: int, every: int) -> bool:
    """Whether an event with this interval is due at a step. every = 0: only at the end of the run."""
    return every > 0 and step % every == 0


def shown(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics for the progress line: the terms as they add up, and each loss before its weight."""
    terms = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
    unweighted = {
        f"{name.removesuffix('/loss')} before weight": value for name, value in values.items() if name.endswith("/loss")
    }
    first = {"loss": terms.pop("total"), "objective": terms.pop("objective")}
    return first | terms | unweighted | {"grad_norm": values["grad_norm"]}


def slow_average(decay: float, steps: int) -> str | None:
    """A warning if the EMA of a run of so many steps keeps more than a tenth of its start; else None."""
    kept = decay**steps
    if kept <= 0.1:
        return None
    said = f"ema_decay = {decay:g} over {steps} steps: the EMA, which is sampled, keeps {100 * kept:.0f}% of its start"
    return f"{said}; in so short a run take --config.ema_decay={max(0, 1 - 5 / steps):.2g}"


def results(workdir: Path, checkpoints: Checkpoints) -> dict[str, Any]:
    """Where the results of a run are."""
    places = {
        "samples": workdir / "samples.png",
        "moving": workdir / "samples.gif",
        "curves": workdir / "curves.png",
        "report": workdir / "report.html",
        "metrics": workdir / "metrics.jsonl",
        "checkpoint": checkpoints.directory / str(checkpoints.latest()),
    }
    if best := checkpoints.best_steps():
        places["best"] = checkpoints.directory / str(best[0])
    found = {name: place for name, place in places.items() if place.exists()}
    return found | {"TensorBoard": f"tensorboard --logdir {workdir}"}


def dry_run(config: ConfigDict, workdir: str | Path | None = None) -> None:
    """Build the run that `config` says, and print its shapes, memory, images, steps and hours. Nothing is written.

    workdir: of a run to go on with, or of a new one.
    """
    cli.silence()
    check(config, [part for part in (*configs.SINGLE, *configs.LABELED) if part != "data"])
    config, assumed = with_data(config)
    check(config)
    place = Path(tempfile.gettempdir(), uuid.uuid4().hex) if workdir is None else Path(workdir).expanduser().absolute()
    with contextlib.ExitStack() as stack:
        plan = Plan(config, place, stack)
        given = None if plan.begin else starting.start(plan.experiment, plan.abstract["params"])  # raises if unfit
        planned = Planned(
            experiment=plan.experiment,
            examples=len(plan.dataset.source),
            batch=plan.batch,
            abstract=plan.abstract,
            init=plan.init,
            key=plan.key_init,
            work=plan.flops,
            begin=plan.begin,
        )
        for line in itertools.chain([assumed] if assumed else [], given.told if given else [], report(planned)):
            if jax.process_index() == 0:
                print(line, flush=True)


def main() -> None:
    """Read the flags, and run, explain or plan."""
    given = flags.FLAGS
    if given.explain is not None:
        print(explain.text(given.config, given.explain, shutil.get_terminal_size((100, 0)).columns))
    elif given.dry_run:
        dry_run(given.config, given.workdir)
    else:
        run(given.config, given.workdir)


def define_flags() -> None:
    """The flags of this program."""
    config_flags.DEFINE_config_file("config", None, "A recipe of the package, or a config file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of the run; made if missing.")
    flags.DEFINE_string("explain", None, "Print what the keys of the config mean, or those below KEY, and run nothing.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_bool(
        "dry_run", False, "Build the run, print shapes, memory, images, steps and hours, and write nothing."
    )
    flags.register_multi_flags_validator(
        ["workdir", "explain", "dry_run"],
        lambda given: given["workdir"] is not None or given["explain"] is not None or given["dry_run"],
        "Flag --workdir must have a value other than None.",
    )


class Program(types.ModuleType):
    """This module as a function: `diversedit_jax.train(config, workdir)`."""

    def __call__(self, config: ConfigDict, workdir: str | Path) -> network.Network:
        """Train as `run` does, and open the run. A run that is done is only opened."""
        run(config, workdir)
        return network.load(workdir, trust_workdir=True)


sys.modules[__name__].__class__ = Program

if __name__ == "__main__":
    define_flags()
    cli.launch(main, several=True)
