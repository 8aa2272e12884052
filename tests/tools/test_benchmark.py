"""Benchmarks: what a ratio is of, tables, variants of a config, flags that are not read, each kind by its command."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diversedit_jax.api import Context
from diversedit_jax.config import slot
from diversedit_jax.configs import digits, diversedit, repa
from diversedit_jax.errors import ConfigError
from tests import ROOT
from tools.benchmark import __main__ as benchmark
from tools.benchmark import loss as benchmark_loss
from tools.benchmark import random_run, timing, variants
from tools.pod_plan import tpu

SMALL = {"depth": 2, "width": 32, "heads": 2, "dtype": "float32"}


# --- Times.


def test_forms_are_timed_in_turn_and_the_first_round_does_not_count():
    calls, seconds = [], iter(range(100))

    def form(name):
        def run() -> float:
            calls.append(name)
            return next(seconds)

        return run

    found = timing.in_turn({name: form(name) for name in "ab"}, 3)
    assert calls == list("abababab")
    assert found == {"a": [2, 4, 6], "b": [3, 5, 7]}


def test_ratios_are_within_rounds():
    """A machine that becomes slower while it works changes no ratio."""
    slower = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert timing.ratios(list(3 * slower), list(slower)) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert timing.spread([2.0, 1.0]) == {"median": 1.5, "low": 1.0, "high": 2.0}


def test_a_table_is_aligned_and_lacks_what_nobody_has():
    found = timing.table(("", "ms", "MFU %", "peak GiB"), [["sit", "12.5", "", "1.0"], ["dit", "3.0", "", ""]])
    assert found.splitlines() == [
        "|     |   ms | peak GiB |",
        "| --- | ---: | -------: |",
        "| sit | 12.5 |      1.0 |",
        "| dit |  3.0 |          |",
    ]


def test_the_command_is_as_one_types_it(monkeypatch):
    words = ["--config=configs/a.py", "--compare=config=configs/b.py model.depth=2", "--compare=sampler.x=(0,1)"]
    monkeypatch.setattr(sys, "argv", ["somewhere/tools/benchmark/__main__.py", "train", *words, "--out=x.json"])
    assert timing.command() == (
        "python -m tools.benchmark train --config=configs/a.py "
        '--compare="config=configs/b.py model.depth=2" --compare="sampler.x=(0,1)"'
    )


# --- What is timed.


def test_another_config_file_keeps_what_the_command_line_changed():
    config = digits.get_config()
    words = f"config={ROOT}/configs/sit.py:b2,512 ema_decay=0.5"
    found, _ = variants.varied(config, words, overrides={"batch_size": 8, "model.size": "S"})
    assert (found.batch_size, found.model.size, found.ema_decay) == (8, "S", 0.5)
    assert tuple(found.data.shape) == (64, 64, 4)
    assert config.batch_size != 8
    for wrong, message in {
        "model.siez=S": "did you mean 'model.size'",
        "config=configs/none.py": "No such file",
        "model.depth": "wanted KEY=VALUE",
    }.items():
        with pytest.raises(ConfigError, match=message):
            variants.varied(config, wrong)
    with pytest.raises(ConfigError, match=r"losses\.diversity\.groups is not in this config"):
        variants.varied(config, f"config={ROOT}/configs/sit.py", overrides={"losses.diversity.groups": 1})


def small(config):
    config.batch_size = 8  # tests have eight devices
    config.data.shape = (8, 8, 4)
    config.model.update(SMALL)
    return config


@pytest.mark.slow
def test_weights_and_data_are_random_and_no_gradient_is_zero():
    """A benchmark of zeros measures another thing: adaLN-Zero starts with gates of zero."""
    run = random_run.make(_without_losses())
    moments = np.asarray(run.batch["moments"], np.float32)
    assert moments.shape == (8, 8, 8, 8)
    assert moments.std() > 0.3
    assert moments.min() >= 0, "standard deviations"
    assert len(np.unique(run.batch["y"])) > 1
    parts, params = run.experiment.components, run.params()
    context = Context(jax.random.key(0), parts.null)

    def loss(params):
        prepared = parts.codec.encode(run.frozen, run.batch, jax.random.key(0))
        return parts.objective.apply(parts.model.network(params), prepared, context).loss.mean()

    gradient = jax.jit(jax.grad(loss))(params)
    zero = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(gradient) if not np.any(leaf)]
    assert not zero


def _without_losses():
    config = small(diversedit.get_config())
    with config.unlocked():
        del config.losses.diversity
    return config


@pytest.mark.slow
def test_a_loss_reads_random_features_and_what_encoders_have_seen(monkeypatch):
    config = small(repa.get_config())
    config.losses.repa.block, config.encoders.dinov2.side = 1, 56  # 4 x 4 patches, as the latents have
    monkeypatch.setitem(random_run.stand_ins.ENCODERS, "dinov2", (1, 384, 14, 16))
    config.losses.diversity = slot("losses", "diversity", groups=2)
    run = random_run.make(config)
    prepared, forward = benchmark_loss.inputs(run)
    assert prepared["features/dinov2"].shape[-1] == 384
    assert len(forward.features) == 3
    assert all(np.std(np.asarray(f, np.float32)) > 0.9 for f in forward.features)
    assert 0 < float(forward.t.min()) < float(forward.t.max()) < 1
    for label, aux in run.experiment.components.losses.items():
        one = benchmark_loss.subject(run, aux, prepared, forward, 1)
        assert one.form() > 0, label


@pytest.mark.parametrize(
    ("name", "hosts", "peak"), [("v5e-16", 4, 16 * 197e12), ("v5e-8", 1, 8 * 197e12), ("v4-32", 4, 16 * 275e12)]
)
def test_what_a_slice_is(name, hosts, peak):
    found = tpu.parse(name)
    assert (found.hosts, found.peak) == (hosts, pytest.approx(peak))


# --- The command.


def flags_with(**given):
    names = {name for names in benchmark.READS.values() for name in names} | {"out"}
    return {name: SimpleNamespace(present=name in given, value=given.get(name)) for name in names}


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("eval", {"vs": "torch"}, "--vs is not read by `eval`"),
        ("loss", {"config": "c", "vs": "torch"}, "--vs is not read by `loss`"),
        ("data", {"config": "c", "compare": ["a=1"]}, "--compare is not read by `data`"),
        ("train", {}, "--config is required"),
        ("train", {"config": "c", "rounds": 0}, "--rounds = 0: must be at least 1"),
        ("loss", {"config": "c", "out": "figures.txt"}, "wanted FILE.json in an existing folder"),
        ("loss", {"config": "c", "out": "nowhere/figures.json"}, "wanted FILE.json in an existing folder"),
    ],
)
def test_what_is_refused(kind, given, message):
    with pytest.raises(ConfigError, match=message):
        benchmark.check(kind, flags_with(**given))
    benchmark.check("train", flags_with(config="c", vs="torch", rounds=1))


def started(tmp_path, kind: str, *words: str):
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tools.benchmark", kind, f"--out={out}", "--rounds=1", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["kind"] == kind
    assert found["versions"]["jax"] == jax.__version__
    text = out.with_suffix(".md").read_text()
    assert text.strip() in done.stdout
    assert found["command"] in text
    return found


DIGITS = f"--config={ROOT}/configs/digits.py"


@pytest.mark.slow
def test_a_loss_is_timed(tmp_path):
    (row,) = started(tmp_path, "loss", DIGITS, "--config.model.depth=2", "--config.batch_size=8")["rows"]
    assert row["name"] == "digits: diversity"
    assert row["s"]["median"] > 0


@pytest.mark.slow
def test_a_training_step_is_timed(tmp_path):
    words = ["--compare=model.remat=full", "--steps=1", "--config.model.depth=2", "--config.batch_size=8"]
    first, second = started(tmp_path, "train", DIGITS, *words)["rows"]
    assert (first["name"], second["name"]) == ("digits", "model.remat=full")
    assert first["ratio"]["median"] == 1
    assert first["images_per_s"] == pytest.approx(8 / first["s"]["median"])
    assert first["tflops_per_device"] == pytest.approx(first["images_per_s"] * first["gflop_per_image"] / 1e3)
    assert second["peak_gib"] > 0
    assert min(first[name] for name in ("compile_s", "dispatch_ms", "parameters")) > 0


@pytest.mark.slow
def test_the_other_kinds_run(tmp_path):
    words = ["--config.sampler.steps=4", "--config.sampler.batch_size=2"]
    (row,) = started(tmp_path, "sample", DIGITS, *words)["rows"]
    assert row["images_per_s"] == pytest.approx(2 / row["s"]["median"])
    found = started(tmp_path, "data", f"--config={ROOT}/configs/diversedit.py:b2")
    assert found["rows"][0]["per_s"]["median"] / found["need_per_host"] == pytest.approx(found["rows"][0]["of_need"])
    assert started(tmp_path, "eval", "--batch_size=16")["features_per_s"] > 0


@pytest.mark.slow
def test_pytorch_is_timed_in_the_same_run(tmp_path):
    pytest.importorskip("torch")
    words = [f"--config={ROOT}/configs/diversedit.py:b2", "--vs=torch", "--config.batch_size=8"]
    words += [f"--config.model.{name}={value}" for name, value in SMALL.items()]
    ours, theirs = started(tmp_path, "train", *words)["rows"]
    assert theirs["name"].startswith("PyTorch")
    assert ours["parameters"] == theirs["parameters"]
    ours, theirs = started(tmp_path, "sample", *words, "--config.sampler.steps=4", "--config.sampler.batch_size=2")[
        "rows"
    ]
    assert theirs["images_per_s"] > 0
