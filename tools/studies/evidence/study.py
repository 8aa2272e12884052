"""Run the study: rows take turns, each piece is written when it is done, and a later call goes on."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diversedit_jax.evaluation import extractors
from diversedit_jax.reading import read_json
from diversedit_jax.runs import build
from diversedit_jax.runtime.files import write_json
from diversedit_jax.runtime.pictures import image_grid, save_png
from diversedit_jax.runtime.progress import duration
from diversedit_jax.runtime.versions import versions
from diversedit_jax.training.checkpoint import Checkpoints
from tools.studies.evidence.judge import Judge
from tools.studies.evidence.lanes import Engine, Group, Lane
from tools.studies.evidence.settings import BASELINE, FACTORS, MEASURED, PIECES, ROWS, TUNING_SEED, Size, config_of

SHOWN, COLUMNS = 40, 10  # samples in a picture
HERE = Path(__file__).parent


class OutOfTime(Exception):
    """The time budget is used up. What is measured is written."""


def digest(size: Size, row: str) -> str:
    """The setting of a row, in 12 hex digits: everything that can change its results, except seed and versions."""
    config = config_of(size, row).to_dict()
    del config["seed"], config["data"]["data_dir"]
    weights = extractors.make("small_resnet", file=str(HERE / size.features)).about
    setting = [config, weights, size.num, size.held_out, size.blocks, PIECES, MEASURED]
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12]


class Study:
    """A folder of results: results/ROW_DIGEST/seedS_rateF_stepN.json, and a picture of samples beside each.

    states: save the states of runs after each turn. deadline: of `time.monotonic`. command: for the records.
    """

    def __init__(
        self, size: Size, out: Path, *, states: bool = True, deadline: float = math.inf, command: str = "(no command)"
    ):
        self.size, self.out, self.states, self.deadline = size, out, states, deadline
        self._engines: dict[str, Engine] = {}
        self._folders: dict[str, Path] = {}
        known = {"command": command, **versions()}
        self._about = {name: known[name] for name in ("command", "git_commit", "devices", "jax") if name in known}

    @cached_property
    def judge(self) -> Judge:
        """The feature network, which has seen the held-out images."""
        config = config_of(self.size, BASELINE)
        train, held_out = (build.open_data(config, split).source for split in ("train", "test"))
        return Judge(HERE / self.size.features, train, held_out, self.size.num)

    @cached_property
    def _labels(self) -> np.ndarray:
        """The labels of the samples: all classes alike."""
        space = build.open_data(config_of(self.size, BASELINE)).space
        return np.arange(self.size.num, dtype=np.int32) % np.int32(space.conditions.classes)

    def shown(self) -> np.ndarray:
        """Draw held-out images: the first of each class, then the second of each."""
        source = build.open_data(config_of(self.size, BASELINE), "test").source
        order = np.argsort(source.labels, kind="stable")
        labels = source.labels[order]
        number = np.arange(len(order)) - np.searchsorted(labels, labels)  # within its class
        return image_grid(source.images[order[np.lexsort((labels, number))[:SHOWN]]], columns=COLUMNS)

    def folder(self, row: str) -> Path:
        """Return where the results of a row are."""
        if row not in self._folders:
            self._folders[row] = self.out / "results" / f"{row}_{digest(self.size, row)}"
        return self._folders[row]

    def file(self, row: str, lane: Lane, step: int) -> Path:
        """Return the file of a result."""
        return self.folder(row) / f"seed{lane.seed}_rate{lane.factor:g}_step{step}.json"

    def results(self, row: str) -> dict[int, dict[int, dict[str, Any]]]:
        """Return what is measured: seed -> step -> result, with the row's learning rate, without tuning."""
        found: dict[int, dict[int, Any]] = {}
        for path in sorted(self.folder(row).glob(f"seed*_rate{self.factor(row):g}_step*.json")):
            result = read_json(path)
            if result["seed"] < TUNING_SEED:
                found.setdefault(result["seed"], {})[result["step"]] = result
        return {seed: dict(sorted(steps.items())) for seed, steps in sorted(found.items())}

    def about(self, *rows: str) -> dict[str, str]:
        """Return how results of rows were made, those of tuning, too: commands, commits, devices, versions."""
        found: dict[str, set[str]] = {}
        for path in (path for row in rows for path in self.folder(row).glob("seed*.json")):
            for name, value in read_json(path)["about"].items():
                found.setdefault(name, set()).add(value)
        return {name: "; ".join(sorted(values)) for name, values in found.items()}

    def factor(self, row: str) -> float:
        """Return the factor of the learning rate with the lower Frechet distance at the last step of tuning."""
        scores = self.tuned(row)
        return min(scores, key=scores.__getitem__) if len(scores) == len(FACTORS) else FACTORS[0]

    def tuned(self, row: str) -> dict[float, float]:
        """Return the Frechet distance at the last step of tuning, by factor of the learning rate."""
        files = {factor: self.file(row, Lane(TUNING_SEED, factor), self.size.steps) for factor in FACTORS}
        return {factor: read_json(file)["frechet"] for factor, file in files.items() if file.exists()}

    def tune(self, rows: Sequence[str]) -> None:
        """Train every row with each factor of the learning rate, on a seed that is not used again."""
        self.turns({row: [Lane(TUNING_SEED, factor) for factor in FACTORS] for row in rows}, measured=(PIECES,))

    def compare(self, rows: Sequence[str], seeds: Sequence[int]) -> None:
        """Train every row with these seeds."""
        self.turns({row: [Lane(seed, self.factor(row)) for seed in seeds] for row in rows}, measured=MEASURED)

    def turns(self, wanted: Mapping[str, Sequence[Lane]], measured: Sequence[int]) -> None:
        """Train lanes one piece at a time, each group in its turn, and measure them after the pieces `measured`.

        OutOfTime if the time budget ends first.
        """
        width, groups = jax.device_count() * self.size.lanes, []
        for row, lanes in wanted.items():
            missing = [lane for lane in lanes if not self.file(row, lane, self.size.steps).exists()]
            chunks = [missing[begin : begin + width] for begin in range(0, len(missing), width)]
            groups += [(row, self._start(row, chunk)) for chunk in chunks]
        rest = sum(PIECES - group.pieces for _, group in groups)
        done, begun = 0, time.monotonic()
        for piece in range(1, PIECES + 1):
            for row, group in groups:
                if group.pieces == piece - 1:
                    if time.monotonic() > self.deadline:
                        raise OutOfTime
                    self._advance(row, group, piece in measured)
                    done += 1
                    left = duration((time.monotonic() - begun) / done * (rest - done))
                    lanes = ", ".join(f"{lane.seed} (x {lane.factor:g})" for lane in group.lanes)
                    loss = np.mean(group.trace[-1]["loss/objective"])
                    print(
                        f"{ROWS[row].label}, seeds {lanes}: {piece}/{PIECES}, loss {loss:.3f}; turn {done} of {rest}, "
                        f"about {left} left",
                        flush=True,
                    )

    def _start(self, row: str, lanes: Sequence[Lane]) -> Group:
        """Begin a group, or restore it."""
        if row not in self._engines:
            self._engines[row] = Engine(self.size, row)
        group = Group(self._engines[row], lanes)
        with Checkpoints(self._states(row, lanes), keep=1) as checkpoints:
            if checkpoints.latest() is not None:
                group.states, _, _ = checkpoints.restore_newest(group.states)
                meta = checkpoints.meta()
                group.pieces, group.seconds, group.trace = meta["pieces"], meta["seconds"], meta["trace"]
        return group

    def _states(self, row: str, lanes: Sequence[Lane]) -> Path:
        name = "_".join(f"seed{lane.seed}_rate{lane.factor:g}" for lane in lanes)
        return self.out / "states" / self.folder(row).name / name

    def _advance(self, row: str, group: Group, measured: bool) -> None:
        """Train a group for a piece, measure it, and save it."""
        group.train()
        step = group.pieces * (self.size.steps // PIECES)
        if measured:
            found, samples = group.measure(self._labels)
            for i, (lane, one) in enumerate(zip(group.lanes, found, strict=True)):
                trace = [{name: values[i] for name, values in piece.items()} for piece in group.trace]
                result = {"row": row, **lane._asdict(), "step": step, "seconds": group.seconds / len(samples), **one}
                result |= self.judge.scores(samples[i], self._labels) | {"trace": trace, "about": self._about}
                file = self.file(row, lane, step)
                file.parent.mkdir(parents=True, exist_ok=True)
                save_png(file.with_suffix(".png"), image_grid(samples[i][:SHOWN], columns=COLUMNS))
                write_json(file, result)
        folder = self._states(row, group.lanes)
        if group.pieces == PIECES:
            shutil.rmtree(folder, ignore_errors=True)
        elif self.states:
            with Checkpoints(folder, keep=1) as checkpoints:
                meta = {"pieces": group.pieces, "seconds": group.seconds, "trace": group.trace}
                checkpoints.save(step, group.states, meta)
