"""The README's example runs, and the files it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
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
