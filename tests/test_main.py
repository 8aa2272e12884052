"""`python -m diversedit_jax` and the command `diversedit`."""

import subprocess
import sys

import pytest

from diversedit_jax import __main__ as program
from diversedit_jax import __version__
from tests import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "diversedit_jax", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_it_lists_the_programs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diversedit"])
    program.main()
    text = capsys.readouterr().out
    assert all(f"  diversedit {name} " in text for name in program.PROGRAMS)
    assert "Train a model" in text
    monkeypatch.setattr(sys, "argv", ["diversedit", "--version"])
    program.main()
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_program_suggests_one(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diversedit", "trian"])
    with pytest.raises(SystemExit, match="78"):
        program.main()
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_it_runs_a_program_with_its_flags():
    done = run("sample", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Sample from a trained run")
    assert "\n  --num=N " in done.stdout, "the program's own flags"
    done = run("sample", "--workdir=nowhere", "--num=2")
    assert (done.returncode, done.stderr) == (78, f"error: {ROOT / 'nowhere'} holds no run: it has no config.json\n")
