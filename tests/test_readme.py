"""The pages that explain: their examples run, and the files, programs and tests that they name exist."""

import importlib
import re
import subprocess
import sys

import pytest

from diversedit_jax import train
from diversedit_jax.configs import digits
from diversedit_jax.runs import trained
from tests import ROOT

PAGES = {
    page: (ROOT / page).read_text()
    for page in ["README.md", "configs/finetuning.md"]
    + [
        f"{room}/README.md"
        for room in ("diversedit_jax", "diversedit_jax/weights", "configs", "launch", "tools", "tests")
    ]
}
README = PAGES["README.md"]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def test_the_loss_in_ones_own_model_goes_down(capsys):
    block, _ = blocks("README.md")
    exec(compile(block, "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 4


@pytest.mark.slow
def test_the_python_of_the_front_page_runs(tmp_path, monkeypatch):
    _, block = blocks("README.md")
    monkeypatch.chdir(tmp_path)
    recipe = digits.get_config

    def small():
        config = recipe()
        config.update({"total_steps": 2, "batch_size": 16})
        config.model.update({"depth": 2, "width": 16, "heads": 2})
        config.sampler.steps, config.samples.num, config.evaluators.digits.num = 2, 0, 110
        config.evaluators.scores.num = 110
        return config

    monkeypatch.setattr(digits, "get_config", small)
    exec(compile(block.replace("num=1000", "num=110"), "README.md", "exec"), found := {})
    assert found["images"].shape == (16, 8, 8, 1)
    assert found["blocks"].shape == (2, 16, 16, 16)
    assert found["scores"]


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 120


def test_the_project_of_the_worked_examples_trains_and_samples(tmp_path, monkeypatch):
    project = tmp_path / "my_project"
    project.mkdir()
    for block in blocks("diversedit_jax/README.md"):
        if name := re.match(r"# my_project/(\w+\.py)\n", block):
            (project / name[1]).write_text(block)
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


ROWS = re.findall(r"^\| \[?`([\w./]+)`.* \| `(.*)` \| ?(quick)? ?\|$", PAGES["tools/README.md"], re.MULTILINE)


def test_every_program_has_a_row_with_an_example():
    programs = {"diversedit", "tools/demo.sh", "tools/test.sh"}
    for path in [*(ROOT / "diversedit_jax").glob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        if "\nif __name__ ==" in path.read_text() and "." in name and "benchmark.torch_" not in name:
            programs.add("tools.examples" if name.startswith("tools.examples") else name)
    assert {row[0] for row in ROWS} == programs


@pytest.mark.parametrize("command", [command for _, command, quick in ROWS if quick])
def test_a_quick_example_runs(command, tmp_path):
    words = command.replace("runs/", f"{tmp_path}/").split()
    assert words[0] == "python"
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["tools/demo.sh", "tools/test.sh"])
def test_a_script_explains_itself(script):
    done = subprocess.run(["bash", ROOT / script, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines()[0].partition(" ")[0]) == (0, "Usage:"), done.stderr


NAMED = sorted(set(re.findall(r"-m ((?:diversedit_jax|tools)\.(?!examples)[\w.]+)", "".join(PAGES.values()))))


@pytest.mark.parametrize(
    "module", [name if name.endswith("sample") else pytest.param(name, marks=pytest.mark.slow) for name in NAMED]
)
def test_the_programs_that_a_page_names_explain_themselves(module):
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"-m {module}" in "\n".join(done.stdout.splitlines()[:12]), "its first lines have no example"
    if module in ("diversedit_jax.sample", "diversedit_jax.evaluate"):
        assert "\n  --cfg_scale=X " in done.stdout.partition("The sampler;")[2], "flags that programs share"
