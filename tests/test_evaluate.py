"""Evaluation as its user sees it: its scores, the same after a kill, and its refusals."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diversedit_jax import conditioning, evaluate, registry, sharding
from diversedit_jax import config as configs
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluate import Images
from diversedit_jax.evaluation import presets, scoring, tables
from diversedit_jax.evaluators import Current, SampleSpec
from diversedit_jax.runs import build, trained
from diversedit_jax.runtime import workdir_lock
from diversedit_jax.sampling import sampler
from tests import ROOT, untrained

NUM = 110  # more than the 96 features of the network for digits, and no multiple of the batch


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that was never trained: its weights are random, all of them, so that labels tell."""
    config = digits.get_config()
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 16})
    config.evaluators = ConfigDict({"scores": slot("evaluators", "scores", extractor="digits", num=NUM)})
    workdir = tmp_path_factory.mktemp("run")
    untrained.leave(workdir, config, {8: ("ema",)}, scale=0.1)
    return workdir


@pytest.fixture(scope="module")
def source(workdir):
    return trained.drawing(trained.of_run(workdir))


@pytest.fixture(scope="module")
def judges(workdir):
    return evaluate.judges_of([], [], str(workdir))


def drawn(source, num=NUM, seed=0, rule="balanced", **varied):
    return evaluate.of_source(source, varied, source.sampler, num, rule, seed)


def scored(judges, images, folder, keep_samples=False):
    ((_, scores),) = evaluate.run(judges, [{}], lambda point: images, folder, keep_samples)
    return scores


@pytest.fixture(scope="module")
def undisturbed(source, judges, tmp_path_factory):
    """The folder of an evaluation that nothing disturbed, and its scores."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, scored(judges, drawn(source), folder, keep_samples=True)


def kept(folder):
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["labels"]


def test_it_leaves_scores_and_all_that_moves_them(undisturbed, workdir):
    folder, scores = undisturbed
    assert {path.name for path in folder.iterdir()} == {"scores.json", "grid.png", "samples.npz"}
    record = json.loads((folder / "scores.json").read_text())
    assert record["scores"] == scores
    assert {"fd_digits", "sfd_digits", "inception_score_digits", "kd_digits"} < scores.keys()
    assert {f"{name}{mark}_digits" for name in ("precision", "recall") for mark in ("", "_float16")} < scores.keys()
    assert all(np.isfinite(list(scores.values())))
    plan = record["plan"]
    assert plan["images"]["step"] == 8
    assert plan["images"]["weights"]["ema_decay"] == 0.995
    assert len(plan["images"]["weights"]["digest"]) == 16
    assert plan["images"]["sampler"]["solver"] == "euler"
    assert plan["images"]["evaluations"] == 2
    assert plan["images"]["decoder"] == {"name": "pixels", "rounding": "nearest"}
    assert (plan["num"], plan["images"]["labels"], plan["images"]["seed"]) == (NUM, "balanced", 0)
    assert plan["extractors"]["digits"]["weights"]["name"] == "random convolutions"
    assert record["versions"]["jax"]
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (13 + 10 * 34 + 2, 10 * 34 + 2), (
            "ten classes of ten, 32 pixels each, 2 between, names beside"
        )


def test_kept_samples_are_those_that_were_judged(undisturbed, source, judges, tmp_path):
    folder, scores = undisturbed
    images, labels = kept(folder)
    assert (images.dtype, images.shape) == (np.uint8, (NUM, 8, 8, 1))
    np.testing.assert_array_equal(labels, np.arange(NUM) % 10)
    found = scored(judges, evaluate.of_file(folder / "samples.npz", None), tmp_path)
    assert found == pytest.approx(scores, rel=1e-5)


def test_images_do_not_depend_on_how_many_are_drawn_at_once(undisturbed, source):
    images, labels = kept(undisturbed[0])
    for first, count in ((0, 16), (48, 16), (96, 14)):
        alone = source.sampler(source.params, source.frozen, labels[first : first + count], 0, first=first)
        np.testing.assert_array_equal(alone, images[first : first + count])
    wide = source.make(**(source.options | {"batch_size": 40}))
    np.testing.assert_array_equal(wide(source.params, source.frozen, labels, 0), images)


def test_an_interrupted_evaluation_goes_on_and_ends_in_the_same_numbers(undisturbed, source, judges, tmp_path, capsys):
    images = drawn(source)
    seen = []

    def stopping(first, count):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(first)
        return images.read(first, count)

    with pytest.raises(KeyboardInterrupt):
        scored(judges, images._replace(read=stopping), tmp_path)
    assert not (tmp_path / "scores.json").exists()
    with pytest.raises(ConfigError, match=r"unfinished evaluation .*\(images.seed: 0 there, 1 given\): finish it"):
        scored(judges, drawn(source, seed=1), tmp_path)

    rest = []

    def counting(first, count):
        rest.append(first)
        return images.read(first, count)

    assert scored(judges, images._replace(read=counting), tmp_path) == undisturbed[1]
    assert "going on: 3 of 7 parts are there" in capsys.readouterr().err
    assert sorted(seen + rest) == list(range(0, NUM, 16))
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "grid.png"}


def test_a_finished_evaluation_is_not_done_again_nor_overwritten(undisturbed, source, judges):
    folder, scores = undisturbed

    def never(first, count):
        raise AssertionError("sampled again")

    assert scored(judges, drawn(source)._replace(read=never), folder) == scores
    with pytest.raises(ConfigError, match=r"holds an evaluation .*images.labels: 'balanced' there, 'uniform' given"):
        scored(judges, drawn(source, rule="uniform"), folder)


def test_a_folder_in_which_another_evaluation_runs_is_refused(undisturbed, source, judges, tmp_path):
    with workdir_lock.held(tmp_path, print):
        with pytest.raises(ConfigError, match=f"{tmp_path} is in use by process {os.getpid()} on "):
            scored(judges, drawn(source), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [workdir_lock.FILE]
        assert scored(judges, drawn(source), undisturbed[0]) == undisturbed[1]


@pytest.mark.slow
def test_other_files_of_the_same_name_are_judged_anew(undisturbed, judges, tmp_path):
    images, _ = kept(undisturbed[0])
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=images)
    first = scored(judges, evaluate.of_file(path, None), tmp_path / "scores")
    assert scored(judges, evaluate.of_file(path, None), tmp_path / "scores") == first
    with pytest.raises(ConfigError, match=r"was done without --keep_samples"):
        scored(judges, evaluate.of_file(path, None), tmp_path / "scores", keep_samples=True)
    np.savez(path, arr_0=images[::-1])
    with pytest.raises(ConfigError, match=r"holds an evaluation .*images.sha256: "):
        scored(judges, evaluate.of_file(path, None), tmp_path / "scores")
    with pytest.raises(ConfigError, match=r"--num=500: .*samples.npz has 110 images"):
        evaluate.of_file(path, 500)


def test_a_sweep_ends_in_a_table_and_plots(source, judges, tmp_path, capsys):
    points = evaluate.sweep_of(["cfg_scale=1.0,1.5", "guidance_interval=0:0.7,0:1"])
    assert points[0] == {"cfg_scale": 1.0, "guidance_interval": (0.0, 0.7)}
    rows = evaluate.run(judges, points, lambda point: drawn(source, **point), tmp_path)
    with open(tmp_path / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["cfg_scale"], row["guidance_interval"]) for row in table] == [
        ("1", "0-0.7"),
        ("1", "0-1"),
        ("1.5", "0-0.7"),
        ("1.5", "0-1"),
    ]
    assert float(table[3]["fd_digits"]) == rows[3][1]["fd_digits"]
    assert rows[0][1] == rows[1][1], "without guidance its interval means nothing"
    assert rows[2][1] != rows[3][1]
    assert (tmp_path / "cfg_scale=1.5,guidance_interval=0-1" / "scores.json").exists()
    with Image.open(tmp_path / "sweep.png") as plot:
        assert plot.size[0] > 2 * plot.size[1] / 1.5
    assert "<svg" in (tmp_path / "sweep.svg").read_text()[:2000]
    out = capsys.readouterr().out
    assert "fd_digits" in out
    assert out.splitlines()[-1] == f"  picture  {tmp_path / 'sweep.png'}", "the last lines say where results are"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cfg=1,2"], "wanted NAME=VALUE,VALUE with NAME one of solver, steps"),
        (["cfg_scale"], "wanted NAME=VALUE,VALUE"),
        (["cfg_scale=1,high"], "'high' is no cfg_scale, wanted a number"),
        (["guidance_interval=0.7"], "'0.7' is no guidance_interval, wanted lo:hi"),
        (["steps=2.5"], "'2.5' is no steps"),
    ],
)
def test_a_sweep_of_nonsense_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.sweep_of(given)


def test_a_sweep_is_what_follows_its_flag():
    points = [{"cfg_scale": scale, "steps": steps} for scale in (1.0, 2.0) for steps in (2, 3)]
    assert evaluate.sweep_of(["cfg_scale=1,2"], ["steps=2,3"]) == points
    assert evaluate.sweep_of([], []) == [{}]
    for given, extra in (([], ["steps=2"]), (["cfg_scale=1"], ["steps"])):
        with pytest.raises(ConfigError, match=f"unexpected argument '{extra[0]}'"):
            evaluate.sweep_of(given, extra)


def test_what_cannot_be_scored_is_refused_before_anything_is_sampled(source, judges, tmp_path):
    def refused(images, message, judges=judges):
        with pytest.raises(ConfigError, match=message):
            scored(judges, images, tmp_path)
        assert not list(tmp_path.iterdir())

    refused(
        drawn(source, num=96), r"96 samples are too few for the covariance of the 96 features of digits: .* least 97"
    )
    refused(drawn(source, num=1), "--num = 1: must be at least 2")
    large = Images(NUM, (16, 16, 1), 16, None, None, {}, "images")
    refused(large, r"wanted images \[b 8 8 1\], given \[1, 16, 16, 1\]")
    assert scored(judges._replace(few=True), drawn(source, num=32), tmp_path / "few")["fd_digits"] > 0
    latents = source._replace(shape=None)
    with pytest.raises(ConfigError, match=r"samples latents, wanted images: give the decoder .*--vae=FILE"):
        drawn(latents)
    with pytest.raises(ConfigError, match=r"give a feature network: --extractor=inception=FILE"):
        evaluate.judges_of([], [], None)
    with pytest.raises(ConfigError, match=r"--extractor=digits: digits is given twice"):
        evaluate.judges_of(["digits", "digits"], [], None)
    with pytest.raises(ConfigError, match=r"extractors.inception: give its file"):
        evaluate.judges_of(["inception"], [], None)


@pytest.mark.parametrize("name", presets.PROTOCOLS)
def test_protocols_are_options_of_the_sampler(name):
    protocol = presets.PROTOCOLS[name]
    known = registry.options(sampler.make)
    assert protocol.sampler.keys() <= known.keys()
    assert {"solver", "steps", "cfg_scale", "guidance_interval", "guidance_channels"} <= protocol.sampler.keys()
    assert protocol.labels in conditioning.RULES
    assert protocol.rounding in ("nearest", "floor")


def test_a_protocol_reaches_the_sampler(workdir):
    protocol = presets.PROTOCOLS["repa"]
    source = trained.drawing(trained.of_run(workdir, rounding=protocol.rounding), overrides=protocol.sampler)
    images = evaluate.of_source(source, {}, source.sampler, NUM, protocol.labels, 0)
    options = images.about["sampler"]
    assert (options["solver"], options["steps"], options["cfg_scale"]) == ("euler_maruyama", 250, 1.8)
    assert tuple(options["guidance_interval"]) == (0.0, 0.7)
    assert images.about["evaluations"] == 250
    assert images.about["decoder"]["rounding"] == "floor"


def test_labels_by_rule():
    balanced = conditioning.labels("balanced", 25, 10, 0)
    np.testing.assert_array_equal(np.bincount(balanced), [3] * 5 + [2] * 5)
    uniform = conditioning.labels("uniform", 10_000, 10, 0)
    np.testing.assert_allclose(np.bincount(uniform) / 10_000, 0.1, atol=5 * 0.3 / 100)
    np.testing.assert_array_equal(uniform[:7], conditioning.labels("uniform", 7, 10, 0))
    assert (uniform != conditioning.labels("uniform", 10_000, 10, 1)).any()
    assert not conditioning.labels("uniform", 5, 0, 0).any(), "without classes the null label alone"
    with pytest.raises(ConfigError, match=r"labels = 'even' is unknown; .*known: balanced, uniform"):
        conditioning.labels("even", 5, 10, 0)


def test_grids_show_classes_in_rows():
    labels = np.arange(3000) % 1000
    rows = tables.grid_rows(labels)
    assert [len({labels[number] for number in row}) for row in rows] == [1] * 10
    assert {len(row) for row in rows} == {3}
    assert (labels[rows[0][0]], labels[rows[-1][0]]) == (0, 999)


def test_the_table_is_readable():
    scores = {"fid": 2.0567, "inception_score": 215.84, "inception_score_std": 3.2, "precision": 0.8265}
    assert tables.table([({}, scores)]).splitlines() == [
        "  fid              2.057",
        "  inception_score  215.84 ± 3.2",
        "  precision        0.8265",
    ]
    rows = [({"cfg_scale": scale, "guidance_interval": (0.0, 0.7)}, scores) for scale in (1.0, 1.35)]
    assert tables.table(rows).splitlines() == [
        "  cfg_scale  guidance_interval    fid  inception_score  precision",
        "          1              0-0.7  2.057           215.84     0.8265",
        "       1.35              0-0.7  2.057           215.84     0.8265",
    ]


# --- As processes.


def command(workdir, out, *flags):
    return [sys.executable, "-m", "diversedit_jax.evaluate", f"--workdir={workdir}", f"--out={out}", *flags]


def program(workdir, out, *flags):
    done = subprocess.run(
        command(workdir, out, *flags), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_program_sweeps_with_the_judges_of_the_run(workdir, tmp_path):
    code, out = program(workdir, tmp_path, f"--num={NUM}", "--labels=uniform", "--sweep", "cfg_scale=1,3", "steps=2,3")
    assert code == 0, out
    assert len(list(tmp_path.glob("*/scores.json"))) == 4
    plan = json.loads((tmp_path / "cfg_scale=3,steps=3" / "scores.json").read_text())["plan"]
    assert (plan["images"]["sampler"]["cfg_scale"], plan["images"]["sampler"]["steps"]) == (3.0, 3)
    assert plan["images"]["labels"] == "uniform"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples=a.npz"], "--samples are finished images: --workdir does nothing to them"),
        pytest.param(["extra"], "unexpected argument 'extra'", marks=pytest.mark.slow),
        pytest.param(["--preset=coco30k"], "30000 samples were asked for, but there are 360", marks=pytest.mark.slow),
        pytest.param(["--num=50"], "50 samples are too few", marks=pytest.mark.slow),
        pytest.param(["--reference=nowhere.npz"], "reference: nowhere.npz does not exist", marks=pytest.mark.slow),
    ],
)
def test_one_line_and_the_exit_code_of_a_config(flags, message, workdir, tmp_path):
    code, out = program(workdir, tmp_path / "out", *flags)
    assert code in (65, 78)
    assert message in out
    assert "Traceback" not in out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_kill_9_at_any_moment_ends_in_the_same_numbers(workdir, tmp_path):
    flags = ["--num=400", "--solver=heun", "--steps=60", "--keep_samples"]
    code, out = program(workdir, tmp_path / "straight", *flags)
    assert code == 0, out
    parts, code, killed, rng = tmp_path / "killed" / "parts", None, 0, np.random.default_rng()
    while code is None:
        begun = len(list(parts.glob("*.npz"))) if parts.exists() else 0
        process = subprocess.Popen(
            command(workdir, tmp_path / "killed", *flags),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while (code := process.poll()) is None and killed < 10:  # dies once it has made a part, at a random moment
            time.sleep(0.02)
            if parts.exists() and len(list(parts.glob("*.npz"))) > begun:
                time.sleep(rng.uniform(0, 0.3))
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
                process.wait()
                break
        else:
            code = process.wait(300)
    assert (code, killed > 2) == (0, True)
    first, second = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("straight", "killed"))
    assert first["scores"] == second["scores"]
    np.testing.assert_array_equal(kept(tmp_path / "straight")[0], kept(tmp_path / "killed")[0])


def test_the_evaluator_of_a_run_scores_as_the_program_does(workdir, source, undisturbed):
    built = build.build(configs.load(workdir), source.space)
    judge = built.config.evaluators.scores
    evaluator = configs.make("evaluators", judge, "config.evaluators.scores", SampleSpec.of(built))

    def sample(labels, first=0):
        return source.sampler(source.params, source.frozen, labels, 0, first=first)

    assert dict(evaluator(Current(None, None, sample))) == pytest.approx(undisturbed[1], rel=1e-6)


def compiled(caplog, function):
    """Whether a call of the function compiles the program `run`, and its result."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        result = function()
    return "Compiling jit(run)" in caplog.text, result


def test_extraction_is_compiled_once(judges, caplog):
    extract = scoring.extraction(judges.extractors, sharding.make(), 16)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), dtype=np.uint8)
    first, whole = compiled(caplog, lambda: extract(images)["digits"])
    again, part = compiled(caplog, lambda: extract(images[:5])["digits"])
    assert (first, again) == (True, False)
    np.testing.assert_array_equal(part.pool, whole.pool[:5])


def test_one_compiled_sampler_serves_every_guidance(source, caplog):
    sample = source.make(**source.options)
    labels = np.arange(16) % 10

    def drawn_with(**guidance):
        return sample(source.params, source.frozen, labels, 0, **guidance)

    first, plain = compiled(caplog, lambda: drawn_with(cfg_scale=1.0))
    again, guided = compiled(caplog, lambda: drawn_with(cfg_scale=3.0, guidance_interval=(0.0, 0.5), first=16))
    assert (first, again) == (True, False)
    assert (plain != guided).any()
