"""Runs of the version before contract 2 (commit d304385) still resume, sample, evaluate and analyze.

tests/data/old_runs/KIND.zip was written by that version, on a CPU. It holds a run on the digits that stopped after
step 4 of 8 (`run`), the metrics of the same run without a stop (`whole.jsonl`), and 10 samples of step 4
(`samples.npz`); for one kind also what `evaluate` and `analyze` found (`scores.json`, `blocks.csv`).
"""

import csv
import json
import zipfile

import numpy as np
import pytest

from diversedit_jax import analyze, config, evaluate, sample, train
from diversedit_jax.runs import trained
from tests import ROOT

KINDS = ["diversedit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mean_flow", "ddpm", "reg"))]
TIMES = {"time", "steps_per_sec", "images_per_sec", "tflops_per_device"}


@pytest.fixture
def folder(kind, tmp_path, monkeypatch):
    """The unpacked files of a kind, as the working directory: the config of `reg` names a file there."""
    with zipfile.ZipFile(ROOT / "tests" / "data" / "old_runs" / f"{kind}.zip") as packed:
        packed.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics(path):
    records = map(json.loads, path.read_text().splitlines())
    return {one["step"]: {name: value for name, value in one.items() if name not in TIMES} for one in records}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_old_run_resumes_to_the_same_metrics(kind, folder):
    longer = config.load(folder / "run")
    longer.total_steps = 8
    train.run(longer, folder / "run")
    found, wanted = metrics(folder / "run" / "metrics.jsonl"), metrics(folder / "whole.jsonl")
    assert {5, 6, 7, 8} <= set(wanted)
    for step in (5, 6, 7, 8):
        assert found[step] == pytest.approx(wanted[step], rel=1e-4, abs=1e-6), f"step {step}, in float32"


@pytest.mark.parametrize("kind", KINDS)
def test_an_old_run_gives_the_same_samples(kind, folder):
    sample.run(trained.drawing(trained.of_run(folder / "run")), num=10, out=folder / "new")
    found, wanted = np.load(folder / "new" / "samples.npz"), np.load(folder / "samples.npz")
    np.testing.assert_array_equal(found["labels"], wanted["labels"])
    off = np.abs(found["arr_0"].astype(int) - wanted["arr_0"])
    assert off.max() <= 1, "levels of 256; another machine may round another way"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diversedit"])
def test_an_old_run_gets_the_same_scores_and_analysis(kind, folder):
    run = folder / "run"
    source = trained.drawing(trained.of_run(run))
    images = evaluate.of_source(source, {}, source.sampler, 64, None, 0)
    judges = evaluate.judges_of((), (), str(run), few=True)
    ((_, scores),) = evaluate.run(judges, [{}], lambda point: images, folder / "scores")
    wanted = json.loads((folder / "scores.json").read_text())["scores"]
    assert scores == pytest.approx(wanted, rel=1e-3, abs=1e-3), "1 of 1,797 digits may have another neighbour"

    settings = analyze.Settings(num=32, batch=16)
    analyze.run([trained.of_run(run, losses=True)], folder / "analysis", settings, times=(0.5,), at=("last",))
    with (folder / "analysis" / "blocks.csv").open() as found, (folder / "blocks.csv").open() as wanted:
        for one, other in zip(csv.DictReader(found), csv.DictReader(wanted), strict=True):
            assert (one["block"], one["other"]) == (other["block"], other["other"])
            assert float(one["similarity"]) == pytest.approx(float(other["similarity"]), rel=1e-5)
