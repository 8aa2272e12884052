"""Plans for TPU slices: names, counts in a program's text, estimates, tables; with libtpu installed, a compilation."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import import_module

import jax
import numpy as np
import pytest

from diversedit_jax import encoders
from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import diversedit, repa, video
from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import flops
from tests import ROOT
from tests.reference import DATA
from tools.benchmark import stand_ins, timing
from tools.pod_plan import hlo, tpu
from tools.pod_plan import plan as pod_plan


@pytest.fixture(scope="module")
def module():
    """A program in the form in which the TPU compiler prints it.

    A loop of 6 turns, counted in twos, gathers a layer's weights, by a collective that two fusions share, and writes a
    layer into a stack; then there are a reduce-scatter, a shift, and sums between slices and within one. S(1) is the
    chip's own memory.
    """
    return hlo.parse((DATA / "loop.hlo").read_text())


def test_a_loop_counts_as_often_as_it_turns(module):
    assert module.entry == "main"
    assert hlo.scheduled(module) == {"main": 1, "body": 6}
    assert hlo.cycles(module) == 6 * 100 + 30


def test_collectives(module):
    row = 128 * 2 * 2  # bytes of the part of weights that a device has
    assert hlo.collectives(module, devices=8, slices=4) == [
        hlo.Collective("reduce-scatter", 8 * 128 * 4 * 3 / 4, 4, 1, False),
        hlo.Collective("collective-permute", 2 * 128 * 4, 2, 1, False),
        hlo.Collective("all-reduce", 2 * 8 * 128 * 4 * 3 / 4, 4, 1, True),
        hlo.Collective("all-reduce", 2 * 8 * 128 * 4 / 2, 2, 1, False),
        hlo.Collective("all-gather", 3 * row, 4, 6, False),  # once, though two fusions share it
    ]


def test_memory_traffic(module):
    layer = 8 * 128 * 4
    entry = layer + layer  # a copy's reading, its writing is on the chip; the total's writing
    # the gathering reads its part; the stack is updated in place by a layer, of what is read a quarter of one
    body = 2 * 128 * 2 + layer + layer // 4
    assert hlo.memory_traffic(module) == entry + 6 * body


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,2,4},{1,3,5}}", 3),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['x'=2,'y'=1,'z'=3] {'x'}", 2),
        ("replica_groups=mesh['x'=2,'y'=3] {'x','y'}", 6),
        ("replica_groups=mesh['x'=3,'y'=1,'z'=2], device_ids=([2,3]T(1,0)) {'x'}", 3),
        ("replica_groups={}", 6),
        ("dimensions={0}", 6),
    ],
)
def test_groups_of_devices(groups, size):
    one = f"  ROOT %sum = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, use_global_device_ids=true"
    module = hlo.parse(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{one}\n}}\n")
    assert [found.group for found in hlo.collectives(module, devices=6)] == [size]


def test_groups_in_an_unknown_form_are_not_guessed():
    one = "  ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups=mesh['x'=4] {'x':(1)2}, use_global_device_ids=true"
    module = hlo.parse(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{one}, more\n}}\n")
    with pytest.raises(ValueError, match="unknown form"):
        hlo.collectives(module, devices=4)


@pytest.mark.parametrize(
    ("name", "topology", "chips", "named"),
    [
        ("v5e:4x4", "4x4", 16, "v5e-16"),
        ("v5e-16", "4x4", 16, "v5e-16"),
        ("v5litepod-8", "2x4", 8, "v5e-8"),
        ("v6e-1", "1x1", 1, "v6e-1"),
        ("v4-32", "2x2x4", 16, "v4-32"),
        ("v5p-64", "2x4x4", 32, "v5p-64"),
        ("v5p:4x4x4", "4x4x4", 64, "v5p-128"),
    ],
)
def test_names_of_slices(name, topology, chips, named):
    found = tpu.parse(name)
    assert (found.topology, found.chips, found.named) == (topology, chips, named)
    assert tpu.parse(named).chips == chips


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "wanted a slice such as v5e:4x4 or v5e-16"),
        ("v9-8", "did you mean|known: v4, v5e"),
        ("v5e-7", "known: v5e-1, v5e-4"),
        ("v4:4x4", "v4 has topologies of 3 positive numbers"),
        ("v6e:2x0", "v6e has topologies of 2 positive numbers"),
    ],
)
def test_slices_that_are_none(name, message):
    with pytest.raises(ConfigError, match=message):
        tpu.parse(name)


def plan(topology: str = "v5e-4", config=None, slices: int = 1) -> pod_plan.Plan:
    return pod_plan.Plan("", config or diversedit.get_config(), tpu.parse(topology), slices)


def test_other_values():
    first = plan()
    words = "model.remat=full batch_size=512 mesh.fsdp=-1 objective.time=logit_normal topology=v4-8 slices=2"
    found = pod_plan.varied(first, words)
    assert (found.config.model.remat, found.config.batch_size, found.config.mesh.fsdp) == ("full", 512, -1)
    assert found.config.objective.time == "logit_normal"
    assert (found.place.named, found.slices, found.chips, found.words) == ("v4-8", 2, 8, words)
    assert (first.config.model.remat, first.config.batch_size) == ("named", 256)
    for wrong, message in [
        ("model.remmat=full", "did you mean 'model.remat'"),
        ("model.remat", "wanted KEY=VALUE"),
        ("batch_size=many", "batch_size=many"),
        ("slices=two", "slices=two"),
    ]:
        with pytest.raises(ConfigError, match=message):
            pod_plan.varied(first, wrong)


def test_remedies_come_in_order_and_can_be_set():
    tried = [pod_plan.varied(plan(), words).config for words in pod_plan.remedies(plan())]
    found = [(c.mesh.fsdp, c.model.remat, c.accumulate, c.batch_size) for c in tried]
    sharded = [(4, "named", 1, 256), (4, "full", 1, 256)]
    parts = [(4, "full", 2, 256), (4, "full", 4, 256)]
    assert found == sharded + parts + [(4, "full", 1, batch) for batch in (128, 64, 32)]
    done = pod_plan.varied(plan(), "mesh.fsdp=4 model.remat=full batch_size=4")
    assert pod_plan.remedies(done) == []
    large = plan("v5e-16")
    assert [pod_plan.varied(large, words).config.mesh.fsdp for words in pod_plan.remedies(large)[:3]] == [4, 16, 16]


def test_shapes_without_data():
    config = diversedit.get_config("512")
    config.batch_size = 8
    space = stand_ins.space(config)
    assert (space.shape, space.conditions.classes) == ((64, 64, 4), 1000)
    batch = stand_ins.stored(config, space)
    assert (batch["moments"].shape, batch["moments"].dtype) == ((8, 64, 64, 8), np.float16)
    assert (batch["y"].shape, batch.keys()) == ((8,), {"moments", "y"})
    batch = stand_ins.stored(repa.get_config("dinov2@5,mae@5"), Space((32, 32, 4), Conditions.labels(1000)))
    assert (batch["image"].shape, batch["image"].dtype) == ((256, 256, 256, 3), np.uint8)
    clips = video.get_config("repa")
    space = stand_ins.space(clips)
    assert space.video
    batch = stand_ins.stored(clips, space)
    assert (batch["moments"].shape, batch["image"].shape) == ((64, 16, 32, 32, 8), (64, 16, 256, 256, 3))
    config.data = slot("data", "synthetic", shape=(8, 8, 1), num_classes=10, size=4)
    config.codec = slot("codecs", "pixels")
    space = stand_ins.space(config)
    assert (space.shape, space.conditions.classes) == ((8, 8, 1), 10)
    assert stand_ins.stored(config, space)["x"].shape == (8, 8, 8, 1)
    config.data.unlock()
    config.data.cached = ("features/dinov2",)
    with pytest.raises(ConfigError, match="not known without the data"):
        stand_ins.stored(config, space)


@pytest.mark.parametrize("name", stand_ins.ENCODERS)
def test_a_stand_in_is_read_as_the_published_encoder(name, tmp_path, monkeypatch):
    _, _, patch, side = stand_ins.ENCODERS[name]
    width = min(import_module(f"diversedit_jax.encoders.{name}").KIND.heads)
    monkeypatch.setitem(stand_ins.ENCODERS, name, (1, width, patch, side))
    encoder = encoders.make(name, file=str(stand_ins.stand_in(name, tmp_path)))
    images = jax.ShapeDtypeStruct((2, 256, 256, 3), np.uint8)
    patches, token = jax.eval_shape(encoder.apply, jax.eval_shape(encoder.init), images)
    assert patches.shape == (2, 256, encoder.width)
    assert (token is None) == (name == "ijepa")


def test_encoders_without_a_published_size_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="the published size of 'mine' is unknown"):
        stand_ins.stand_in("mine", tmp_path)


def found(**changes) -> dict:
    """What `compiled` gives, of round numbers."""
    bytes_ = {"arguments": 2, "outputs": 1, "donated": 1, "temporaries": 9, "code": 1, "peak": 8}
    collective = {"kind": "all-gather", "members": 4, "times": 6, "sent_bytes": 5 * 10**8, "between_slices": False}
    train = {
        "fits": True,
        "bytes": {kind: gib * 2**30 for kind, gib in bytes_.items()},
        "hbm_bytes": 819 * 10**8,
        "cycles": 3 * 10**8,
        "collectives": [collective, {**collective, "sent_bytes": 3_125 * 10**5, "between_slices": True}],
        "compile_s": 60.0,
    }
    sample = train | {"bytes": dict.fromkeys(bytes_, 2**29), "compile_s": 5.0}
    return {
        "device_kind": "TPU v5 lite",
        "mesh": {"fsdp": 4},
        "batch_per_chip": 64.0,
        "parameters": 10**6,
        "flops": {"needed": 4 * 197 * 10**11, "performed": 4 * 197 * 10**11},
        "programs": {"train": train | changes, "sample": sample},
    }


def test_what_bounds_a_step():
    guess = pod_plan.estimate(found(), plan(), 0.5)
    assert guess["compute_ms"] == pytest.approx(200)
    assert guess["hbm_ms"] == pytest.approx(100)
    assert guess["ici_ms"] == pytest.approx(5)
    assert guess["dcn_ms"] == pytest.approx(100)
    assert guess["compiler_ms"] == pytest.approx(200)
    assert guess["bound"] == "compute"
    best, worst = guess["hidden"], guess["in_turn"]
    assert best["step_ms"] == pytest.approx(200)
    assert worst["step_ms"] == pytest.approx(200 + 5 + 100)
    assert best["images_per_sec"] == pytest.approx(256 / 0.2)
    assert best["mfu"] == pytest.approx(0.5)
    assert best["days"] == pytest.approx(400_000 * 0.2 / 86_400)
    assert worst["chip_hours"] == pytest.approx(4 * 400_000 * 0.305 / 3600)
    assert pod_plan.estimate(found(hbm_bytes=819 * 10**9), plan(), 0.5)["bound"] == "hbm"
    unknown = pod_plan.estimate(found(), plan("v6e-4"), 0.5)
    assert (unknown["dcn_ms"], unknown["compiler_ms"], unknown["in_turn"]) == (None, None, None)


def test_a_row_counts_the_state_that_stays():
    row = pod_plan.row_of(plan(), found(), 0.5)
    assert row["fits"]
    assert row["programs"]["train"]["needs_gib"] == 8 + 1
    assert row["programs"]["sample"]["needs_gib"] == 2 + 0.5  # the state, and a program whose input is part of it
    large = found()
    large["programs"]["sample"]["bytes"]["peak"] = 2**34
    assert not pod_plan.row_of(plan(), large, 0.5)["fits"]


def test_tables():
    row = pod_plan.row_of(plan(), found(), 0.5)
    small = found() | {"programs": {"train": {"fits": False, "needs_gib": 20.5, "compile_s": 3.0}}}
    failed = pod_plan.row_of(plan(), small, 0.5)
    head, _, first, second = pod_plan.table([row, failed]).splitlines()
    assert head.replace("|", "").split()[:2] == ["slice", "mesh"]
    wanted = "the config v5e-4 (2x2) fsdp 4 64 named 9.00/15.75 yes 200-305 1,280-839 50-33 0.9-1.4 89-136"
    assert " ".join(first.replace("|", "").split()) == wanted
    assert " ".join(second.replace("|", "").split()) == "the config v5e-4 (2x2) fsdp 4 64 named 20.50/15.75 NO"
    text = pod_plan.details(row, 0.5)
    for words in [
        "(counted)",
        "(compiler",
        "(estimated",
        "sent between slices (counted): 6 x all-gather of 4",
        "MFU 50.0%; 0.93 days",
        "136 chip-hours",
    ]:
        assert words in text
    assert "does not fit" in pod_plan.details(failed, 0.5)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("the total memory required for HLO temporaries (284.72G) exceeds available HBM (15.75G)", 284.72),
        ("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm. Exceeded", 0.5),
        ("INTERNAL: something else", None),
    ],
)
def test_messages_of_a_program_that_does_not_fit(message, needed):
    assert pod_plan.out_of_memory(message) == needed


def test_figures_of_several_commands_share_a_file(tmp_path):
    for command in ("a", "b", "a"):
        pod_plan.record(
            tmp_path / "plan.json", command, [pod_plan.row_of(plan(), found(), 0.5)], 0.5, timing.hardware()
        )
    held = json.loads((tmp_path / "plan.json").read_text())
    assert list(held["plans"]) == ["a", "b"]
    assert held["plans"]["a"]["versions"]["jax"] == jax.__version__
    assert len(held["plans"]["a"]["rows"]) == 1
    assert held["sources"].keys() == pod_plan.SOURCES.keys()
    assert timing.shown("--compare=a=1 b=2") == '--compare="a=1 b=2"'


def test_peaks_are_known():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    assert kinds.keys() == tpu.GENERATIONS.keys()
    assert all(flops.peak(kind) for kind in kinds.values())


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.pod_plan", *arguments]
    environment = os.environ | {"XLA_FLAGS": ""}  # those of the tests are for CPUs: the compiler for TPUs ends on them
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_small_network_is_planned(tmp_path):
    size = ["--config.model.depth=2", "--config.model.width=32"]
    place = ["--config=configs/digits.py", "--topology=v5e-4", "--config.mesh.fsdp=4"]
    large = "model.width=4096 model.depth=48 model.remat=none batch_size=4096"
    process = run(*place, *size, f"--compare={large}", f"--json={tmp_path / 'plan.json'}")
    assert process.returncode == 0, process.stderr
    (made,) = json.loads((tmp_path / "plan.json").read_text())["plans"].values()
    assert "libtpu" in made["versions"]
    fitting, failing = made["rows"]
    assert fitting["fits"]
    assert set(fitting["programs"]) == set(pod_plan.PROGRAMS)
    held = fitting["programs"]["train"]["bytes"]
    assert 0 <= held["outputs"] - held["donated"] < 2**16  # the state is donated whole; the rest are metrics
    assert sum(total["times"] for total in fitting["programs"]["train"]["collectives"]) > 0
    assert not failing["fits"]
    assert failing["programs"]["train"]["needs_gib"] > failing["hbm_gib"]
    assert "NO" in process.stdout
