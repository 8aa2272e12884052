"""The README's example runs, and the files it names exist."""

import re
import subprocess
import sys

import pytest

from tests import ROOT

README = (ROOT / "README.md").read_text()


def test_the_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "orthogonality" in capsys.readouterr().out


def test_the_files_it_names_exist():
    names = re.findall(r"\b(?:configs|tools|tests|diversedit_jax)/[\w/.]+\w(?![{\w])", README)
    assert len(names) > 5
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing, f"the README names {missing}"


@pytest.mark.parametrize(
    "module",
    [
        "diversedit_jax.train",
        "diversedit_jax.sample",
        "diversedit_jax.evaluate",
        "diversedit_jax.analyze",
        "tools.benchmark.analysis",
        "tools.studies.blocks",
        "tools.benchmark",
        "tools.pod_plan",
        "tools.studies.methods",
        "tools.prepare_latents",
        "tools.reference_stats",
    ],
)
def test_the_programs_it_names_explain_themselves(module):
    assert f"-m {module}" in README
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert f"-m {module}" in done.stdout, done.stderr
    if module in ("diversedit_jax.sample", "diversedit_jax.evaluate"):
        assert "--cfg_scale:" in done.stdout, "flags that programs share are not listed"
