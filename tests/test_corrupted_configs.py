"""Corrupted configs, see `tests.corrupted`: each is refused in one line with its key, before anything compiles."""

import os
import subprocess
import sys

import pytest

from tests import ROOT, corrupted


def test_some_corrupted_configs_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some name folders
    count, found = corrupted.faults(step=149)
    assert count > 50
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_all_corrupted_configs_are_refused_in_one_line(tmp_path):
    """As users run it, without the checks of types that the tests add."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.corrupted"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
