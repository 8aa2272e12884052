"""tools.chaos in its smallest form, and what it reads of a run."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from tests import ROOT
from tools.chaos import attack
from tools.chaos import disturb as chaos
from tools.chaos.processes import AS_USER, alive


def test_what_a_run_says_is_read():
    assert chaos.step_of("starting a new run\n") == 0
    assert chaos.step_of("step   3/120  loss 1\nstep  12/120  5 steps/s\nsaved\n") == 12


def test_layouts_are_meshes_of_eight_devices_or_fewer():
    layouts = chaos.layouts()
    assert len(set(layouts)) == len(layouts) == 19
    assert {(8, 1, 1), (4, 2, 2), (2, 4, 1), (1, 8, 2), (1, 1, 1)} <= set(layouts)
    assert all(data * fsdp % count == 0 for data, fsdp, count in layouts)


def test_a_process_is_alive_until_it_has_ended():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert alive(process.pid) == [process.pid]
        process.stdin.close()
        while alive(process.pid):  # a zombie does not count: nobody has waited for it yet
            pass


@pytest.mark.slow
def test_runs_that_are_disturbed_end_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, "-m", "tools.chaos", f"--out={tmp_path}", f"--json={tmp_path / 'found.json'}"]
    command += ["--kills=2", "--topologies=1", "--nodamages", "--attacks=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kills"]["kills"] == 2
    assert found["kills"]["runs_finished_and_equal"] >= 1
    assert found["topologies"]["restarts"] == 1


@pytest.mark.slow
@pytest.mark.skipif(AS_USER != [] and shutil.which(AS_USER[0]) is None, reason="root may read anything")
def test_a_run_that_meets_every_attack_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    chaos.to_end(tmp_path / "undisturbed")
    kinds = iter(attack.ATTACKS)
    one_each = random.Random(0)
    one_each.choice = lambda given: next(kinds) if given == list(attack.ATTACKS) else given[0]
    found = attack.attacked(tmp_path, tmp_path / "undisturbed", len(attack.ATTACKS), one_each)
    assert set(found["by_kind"].values()) == {1}
    assert found["runs_finished_and_equal"] == 1
