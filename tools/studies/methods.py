"""Compare the methods, alone and together, on a small example: one table, over several seeds.

    python -m tools.studies.methods --out=tools/benchmark/records/methods_digits.json
    python -m tools.studies.methods --example=moving_digits --steps=1000 --num=200 \\
        --out=tools/studies/records/moving_digits.json

Each row is the recipe of the example with another method: digits (all methods), moving_digits (videos) or solids
(volumes; the parts of DiverseDiT). REPA and REG align to a small vision transformer that is trained first, see
digits_encoder.py. All rows of a seed train in turn, some steps at a time, so that their rates can be compared. The same
command goes on after the seeds that OUT holds. Writes OUT (.json) and the table beside it (.md).
"""

import importlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import sharding
from diversedit_jax.analysis.features import features
from diversedit_jax.api import Batch
from diversedit_jax.config import slot
from diversedit_jax.data import pipeline
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluators import SampleSpec
from diversedit_jax.metrics.similarity import cka, off_diagonal_mean
from diversedit_jax.registry import one_of
from diversedit_jax.runs import build
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.cli import silence
from diversedit_jax.runtime.files import write_json, write_text
from diversedit_jax.runtime.versions import versions
from diversedit_jax.sampling.sampler import Sampler
from diversedit_jax.training.step import initializer, train_step
from tools.studies import digits_encoder

EXAMPLE = flags.DEFINE_string("example", "digits", "The recipe: digits, moving_digits or solids.")
STEPS = flags.DEFINE_integer("steps", 1500, "Training steps of every run.")
BATCH = flags.DEFINE_integer("batch_size", 32, "Examples of a step.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.")
NUM = flags.DEFINE_integer("num", 1000, "Samples that are scored.")
RATE = flags.DEFINE_float("learning_rate", None, "Of every run; by default that of the recipe.")
CHUNK = flags.DEFINE_integer("chunk", 50, "Steps that a row trains before the next row's turn.")
ONLY = flags.DEFINE_list("only", None, "Rows to run, by name; by default all.")
OUT = flags.DEFINE_string("out", None, "JSON file to write, and to continue.", required=True)


def residuals(config: ConfigDict) -> None:
    """Add the long residual connections, as released."""
    config.model.skip = "release"


def diversity(config: ConfigDict) -> None:
    """Add the diversity loss, as released."""
    config.losses.diversity = slot("losses", "diversity", preset="release")


def factorised(config: ConfigDict) -> None:
    """Let blocks attend within a frame and across frames in turn."""
    config.model.attention_axes = "factorised"


def same_kind(config: ConfigDict) -> None:
    """Join and compare blocks that attend along the same axis."""
    if config.model.skip != "none":
        config.model.pairing = "same_kind"
    for loss in config.losses.values():
        loss.kinds = 2


def repa(config: ConfigDict) -> None:
    """Align the second of four blocks to the encoder of digits."""
    config.encoders.dinov2 = digits_encoder.slot_of(ENCODER["file"])
    config.losses.repa = slot("losses", "repa", block=2, width=128)


def sra(config: ConfigDict) -> None:
    """Align the first block to the third block of the EMA network."""
    config.losses.sra = slot("losses", "sra", block=1, teacher_block=3, decay_epochs=None)


def dispersive(config: ConfigDict) -> None:
    """Add the dispersive loss with the paper's settings: at a quarter of the depth, in groups of 16."""
    config.losses.dispersive = slot("losses", "dispersive", blocks=(1,), groups=BATCH.value // 16)


def reg(config: ConfigDict) -> None:
    """Add the class token of the encoder of digits beside the image, and align to the encoder."""
    repa(config)
    config.losses.repa.class_token = True
    config.objective = slot("objectives", "reg", width=digits_encoder.WIDTH, time="logit_normal")


def mean_flow(config: ConfigDict) -> None:
    """Sample in one step. Guidance is trained in, with a scale of 1.5 as for the other rows."""
    config.objective = slot("objectives", "mean_flow", kappa=1 / 3)
    config.sampler.update({"solver": "mean_flow", "steps": 1, "cfg_scale": 1.0})


DIVERSEDIT = (residuals, diversity)
PARTS = {
    "SiT": (),
    "+ long residuals": (residuals,),
    "+ diversity loss": (diversity,),
    "DiverseDiT (both)": DIVERSEDIT,
}
KINDS = {
    "+ long residuals (same kind)": (residuals, same_kind),
    "+ diversity loss (same kind)": (diversity, same_kind),
    "DiverseDiT (same kind)": (*DIVERSEDIT, same_kind),
}
VIDEOS = {"SiT (joint attention)": ()}
VIDEOS |= {name: (factorised, *changes) for name, changes in (PARTS | KINDS).items()}
METHODS = PARTS | {
    "REPA": (repa,),
    "REPA + DiverseDiT": (repa, *DIVERSEDIT),
    "SRA": (sra,),
    "SRA + DiverseDiT": (sra, *DIVERSEDIT),
    "DispLoss": (dispersive,),
    "DispLoss + DiverseDiT": (dispersive, *DIVERSEDIT),
    "DiverseDiT + DispLoss + SRA": (*DIVERSEDIT, dispersive, sra),
    "REG": (reg,),
    "REG + DiverseDiT": (reg, *DIVERSEDIT),
    "MeanFlow (1 step)": (mean_flow,),
    "MeanFlow + DiverseDiT (1 step)": (mean_flow, *DIVERSEDIT),
}
ONCE = {"xla_backend_optimization_level": 0}  # compiler options of programs that run once a seed
ENCODER: dict[str, str] = {}  # {"file": path}, once it is trained


class Example(NamedTuple):
    """A recipe whose evaluator of the same name judges samples.

    rows: label -> changes to the recipe without long residuals and losses.
    shares: scores of the evaluator that are shown in percent, name -> title of the column.
    distances: other scores, name -> (title, decimal places).
    """

    rows: dict[str, tuple[Callable[[ConfigDict], None], ...]]
    shares: dict[str, str]
    distances: dict[str, tuple[str, int]]

    @property
    def columns(self) -> dict[str, tuple[str, int]]:
        """Of the table: (title, decimal places)."""
        return {
            "loss": ("error", 3),
            **{name: (f"{title}, %", 1) for name, title in self.shares.items()},
            **self.distances,
            "similarity": ("CKA of blocks", 3),
            "rate": ("steps/s", 1),
        }


FRECHET = {"frechet": ("Fréchet distance", 2)}
FRAMES = {"frechet_frame": ("Fréchet distance of frames", 3), "frechet_clip": ("of videos", 3)}
EXAMPLES = {
    "digits": Example(METHODS, {"accuracy": "accuracy"}, FRECHET),
    "moving_digits": Example(VIDEOS, {"all": "all right", "digit": "digit", "motion": "motion"}, FRAMES),
    "solids": Example(PARTS, {"accuracy": "accuracy", "one_piece": "one piece"}, FRECHET),
}
Results = dict[str, dict[str, float]]  # row -> column -> number
COMPARED = 1024  # most tokens for the similarity of blocks: CKA has a matrix of tokens x tokens


class Method(NamedTuple):
    """A row, compiled once for all seeds."""

    built: build.Experiment
    sampler: Sampler
    frozen: Any
    init: Callable
    step: Callable
    judge: Callable


def prepare(changes: tuple[Callable[[ConfigDict], None], ...]) -> Method:
    """Build and compile a row: a plain SiT on the example's data, with changes to its config."""
    config = importlib.import_module(f"diversedit_jax.configs.{EXAMPLE.value}").get_config()
    config.model.skip = "none"
    config.losses = ConfigDict()
    config.total_steps, config.batch_size = STEPS.value, BATCH.value
    config.optim.learning_rate = RATE.value or config.optim.learning_rate
    for change in changes:
        change(config)
    built = build.build(config, build.open_data(config).space)
    batch = next(batches(config, 0))
    init = jax.jit(initializer(built.components, batch), compiler_options=ONCE)
    step = jax.jit(partial(train_step, built.components), donate_argnums=0)
    judge = config.evaluators[EXAMPLE.value]
    judge.num = NUM.value
    judge = configs.make("evaluators", judge, f"config.evaluators.{EXAMPLE.value}", SampleSpec.of(built))
    frozen = build.frozen_weights(built.components.codec, built.layout)
    return Method(built, built.sampler(), frozen, init, step, judge)


def batches(config: ConfigDict, seed: int) -> Iterator[Batch]:
    """Yield the training batches of a seed, on the device."""
    over_batch = sharding.over_batch(sharding.make())
    for batch in pipeline.batches(build.open_data(config), config.batch_size, seed=seed, num_threads=0):
        yield jax.device_put(batch, over_batch)


def error_of(metrics: dict[str, jax.Array], elements: int) -> float:
    """Return the mean squared error per element, of the velocity or the data. Objectives name it differently."""
    if "v_loss" in metrics:
        return float(metrics["v_loss"]) / elements
    return float(metrics.get("image", metrics["loss/objective"]))


def similarity(method: Method, params: Any) -> float:
    """Return the mean linear CKA of two different blocks, for tokens of held-out examples at t = 1/4, 1/2 and 3/4."""
    test = build.open_data(method.built.config, "test")
    count = COMPARED // math.prod(method.built.components.model.grid)
    batch = pipeline.stacked([test.source[i] for i in range(count)])
    key = jax.random.key(0)

    @partial(jax.jit, compiler_options=ONCE)
    def mean(params, frozen):
        found = []
        for t in (0.25, 0.5, 0.75):
            stack = features(method.built, {"params": params}, frozen, batch, t, key, False)
            found.append(off_diagonal_mean(cka([block.reshape(-1, block.shape[-1]) for block in stack])))
        return jnp.mean(jnp.stack(found))

    return float(mean(params, method.frozen))


def train(methods: dict[str, Method], seed: int) -> Results:
    """Train all rows with one seed, in turn, and score them."""
    key_init, key_run = jax.random.split(jax.random.key(seed))
    loaders = {name: batches(method.built.config, seed) for name, method in methods.items()}
    states = {name: method.init(key_init) for name, method in methods.items()}
    errors, seconds = {name: [] for name in methods}, {name: [] for name in methods}
    for begin in range(0, STEPS.value, CHUNK.value):
        count = min(CHUNK.value, STEPS.value - begin)
        for name, method in methods.items():
            started, metrics = time.perf_counter(), []
            for _ in range(count):
                states[name], found = method.step(states[name], method.frozen, next(loaders[name]), key_run)
                metrics.append(found)
            jax.block_until_ready(states[name])
            if begin:  # the first steps compile
                seconds[name].append((time.perf_counter() - started) / count)
            elements = math.prod(method.built.space.shape)
            errors[name] += [error_of(found, elements) for found in metrics]
        print(f"seed {seed}: step {begin + count} of {STEPS.value}", flush=True)
    results, example = {}, EXAMPLES[EXAMPLE.value]
    for name, method in methods.items():
        ema = states[name]["ema"]
        scores = dict(method.judge(partial(method.sampler, ema, method.frozen, seed=seed)))
        results[name] = {
            "loss": statistics.mean(errors[name][-100:]),
            **{score: 100 * scores[score] for score in example.shares},
            **{score: scores[score] for score in example.distances},
            "similarity": similarity(method, ema),
            "rate": 1 / statistics.median(seconds[name]) if seconds[name] else float("nan"),
        }
        shown = (f"{results[name][column]:>10.{places}f}" for column, (_, places) in example.columns.items())
        print(f"{name:<32}" + "".join(shown), flush=True)
    return results


def table(results: dict[str, Results]) -> str:
    """Write means over seeds ± standard deviations as a Markdown table."""
    seeds, columns = list(results.values()), EXAMPLES[EXAMPLE.value].columns
    lines = [f"| | {' | '.join(title for title, _ in columns.values())} |", f"|---|{'---|' * len(columns)}"]
    for name in seeds[0]:
        cells = []
        for column, (_, places) in columns.items():
            values = [seed[name][column] for seed in seeds]
            spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 and column != "rate" else ""
            cells.append(f"{statistics.mean(values):.{places}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def study(
    asked: dict[str, Any], of_seeds: Callable[[list[int]], Iterator[tuple[int, Results]]], table: Callable
) -> None:
    """Go on with a study: add the seeds that --out lacks, and write the table.

    asked: the settings; another study in --out is an error. of_seeds: seeds -> each with its results.
    table: results of all seeds -> Markdown.
    """
    out = Path(OUT.value)
    stored = json.loads(out.read_text()) if out.exists() else {"flags": asked, "seeds": {}}
    if stored["flags"] != asked:
        raise ConfigError(f"{out} holds another comparison ({stored['flags']}): remove it, or give its flags")
    todo = [seed for seed in range(SEEDS.value) if str(seed) not in stored["seeds"]]
    for seed, results in of_seeds(todo) if todo else ():
        stored["seeds"][str(seed)] = results
        stored["versions"] = versions()
        write_json(out, stored)
    text = table(stored["seeds"])
    write_text(out.with_suffix(".md"), text)
    print(text)


def main() -> None:
    """Train the seeds that --out does not hold yet."""
    silence()
    rows = EXAMPLES[one_of("--example", EXAMPLE.value, EXAMPLES)].rows
    names = ONLY.value or list(rows)
    asked = {"steps": STEPS.value, "batch_size": BATCH.value, "num": NUM.value, "rows": names}
    if EXAMPLE.value != "digits" or RATE.value:
        asked |= {"example": EXAMPLE.value, "learning_rate": RATE.value}
    changes = {name: rows[one_of("--only", name, rows)] for name in names}

    def of_seeds(seeds: list[int]) -> Iterator[tuple[int, Results]]:
        with tempfile.TemporaryDirectory() as folder:
            ENCODER["file"] = f"{folder}/encoder.safetensors"
            if EXAMPLE.value == "digits":
                print(f"the encoder recognises {digits_encoder.train(ENCODER['file']):.1%} of the held-out digits")
            methods = {name: prepare(change) for name, change in changes.items()}
            yield from ((seed, train(methods, seed)) for seed in seeds)

    study(asked, of_seeds, table)


if __name__ == "__main__":
    cli.launch(main)
