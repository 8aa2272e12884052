"""The pages that explain: their examples run, and the files, programs and tests that they name exist."""

import importlib
import re
import subprocess
import sys

import pytest

from diversedit_jax import train
from diversedit_jax.runs import trained
from tests import ROOT

PAGES = {
    page: (ROOT / page).read_text()
    for page in ["README.md"]
    + [
        f"{room}/README.md"
        for room in ("diversedit_jax", "diversedit_jax/weights", "configs", "launch", "tools", "tests")
    ]
}
README = PAGES["README.md"]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def test_the_example_runs(capsys):
    (block,) = blocks("README.md")
    exec(compile(block, "README.md", "exec"), {})
    assert "orthogonality" in capsys.readouterr().out


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 120


def test_the_project_of_the_worked_examples_trains_and_samples(tmp_path, monkeypatch):
    project = tmp_path / "my_project"
    project.mkdir()
    for block in blocks("diversedit_jax/README.md"):
        name = re.match(r"# my_project/(\w+\.py)\n", block)[1]
        (project / name).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    config = importlib.import_module("my_project.config").get_config()
    config.update({"total_steps": 3, "batch_size": 16})
    config.samples.num = 4
    state = train.run(config, tmp_path / "run")
    assert int(state["step"]) == 3
    source = trained.drawing(trained.of_run(tmp_path / "run", trust=True), overrides={"cfg_scale": 2.0, "steps": 2})
    conditions = source.conditions(None, 4, seed=0)
    assert conditions.shape == (4, 3)
    assert source.sampler(source.params, source.frozen, conditions, seed=0).shape == (4, 8, 8, 1)


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_exist(page):
    folder = (ROOT / page).parent
    links = [folder / link for link in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page])]
    roots = r"\b(?:configs|tools|tests|diversedit_jax)/[\w/.]+\w(?![{\w*])"
    named = [ROOT / name for name in re.findall(roots, re.sub(r"\]\([^)]*\)", "]", PAGES[page]))]
    missing = [str(path) for path in (*links, *named) if not path.exists()]
    assert not missing, f"{page} names {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_the_configs_that_a_page_names_build(page):
    for name, variant in set(re.findall(r"configs/(\w+)\.py:([\w,@]+)", PAGES[page])):
        importlib.import_module(f"diversedit_jax.configs.{name}").get_config(variant)


def test_the_tests_that_a_page_names_exist():
    known = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for line in re.findall(r"^\| \d+ \|.*\| (.*) \|$", PAGES["launch/README.md"], re.MULTILINE):
        for file, parts in re.findall(r"`(test_\w+)`:? ?([^;]*)", line):
            assert file in known, line
            for part in re.findall(r"\w+", re.sub(r"\([^)]*\)", "", parts)):
                assert re.search(rf"def test_\w*{part}", known[file]), f"{file} has no test {part}"


NAMED = sorted(set(re.findall(r"-m ((?:diversedit_jax|tools)\.(?!examples)[\w.]+)", "".join(PAGES.values()))))


@pytest.mark.parametrize(
    "module", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("tools") else name for name in NAMED]
)
def test_the_programs_that_a_page_names_explain_themselves(module):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"-m {module}" in "\n".join(done.stdout.splitlines()[:12]), "its first lines have no example"
    if module in ("diversedit_jax.sample", "diversedit_jax.evaluate"):
        assert "\n  --cfg_scale=X " in done.stdout.partition("The sampler;")[2], "flags that programs share"
