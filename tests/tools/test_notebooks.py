"""The notebooks: their cells run in order with small numbers, and what is stored in them can be shown to anybody."""

import ast
import json
import re

import jax
import matplotlib
import numpy as np
import pytest

from diversedit_jax.configs import digits
from diversedit_jax.runs.check import check
from tests import ROOT

matplotlib.use("Agg")

FOLDER = ROOT / "tools" / "examples"
REPOSITORY = "diversedit-jax/diversedit_jax"  # where the notebooks' links lead, and what they install
SMALL = {
    "digits": {"STEPS": 1, "BATCH": 16, "SCORED": 110},
    "your_own_transformer": {"STEPS": 12, "BATCH": 16},
    "what_your_blocks_look_like": {"STEPS": 2, "BATCH": 16, "DEPTH": 2, "IMAGES": 16},
    "from_a_release_to_a_diversedit": {"STEPS": 2, "MORE": 2, "BATCH": 16, "SCORED": 110, "SOLVER_STEPS": 2},
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def notebook(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def tagged(cells, tag):
    """The one cell with a tag."""
    (found,) = [cell for cell in cells if tag in cell["metadata"].get("tags", ())]
    return found


def changed(source, values):
    """The source of a cell with other values at its assignments `NAME = VALUE  # comment`."""
    for name, value in values.items():
        source, count = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value}  ", source)
        assert count == 1, f"the parameters assign {name} {count} times"
    return source


def execute(source, name, namespace):
    """Run a cell, and show the value of its last expression as a notebook would."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if last is None:
        return
    value = eval(compile(last, name, "eval"), namespace)
    for form in ("__repr__", "_repr_html_", "_repr_png_"):
        if show := getattr(value, form, None):
            show()


def small_recipe(recipe=digits.get_config):
    """The recipe of the digits with a smaller network and fewer steps of its sampler."""
    config = recipe()
    config.model.update({"depth": 2, "width": 16, "heads": 2})
    config.sampler.steps, config.samples.num = 2, 0
    return config


def run(name, tmp_path, monkeypatch):
    """Run a notebook with small numbers in an empty folder. Returns its names."""
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "get_config", small_recipe)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    cells, namespace = notebook(name)["cells"], {"__name__": "__main__"}
    install, parameters = (tagged(cells, tag) for tag in ("install", "parameters"))
    for cell in cells:
        if cell["cell_type"] == "code" and cell is not install:
            source = "".join(cell["source"])
            execute(changed(source, SMALL[name]) if cell is parameters else source, f"{name}: {cell['id']}", namespace)
    assert not plt.get_fignums(), "a figure that is not shown"
    return namespace


def test_every_notebook_is_run():
    assert set(SMALL) == set(NAMES)


def test_from_training_to_samples(tmp_path, monkeypatch):
    found = run("digits", tmp_path, monkeypatch)
    assert found["images"].shape == (100, 8, 8, 1)
    assert np.isfinite(found["scores"]["fd_digits"])


@pytest.mark.slow
def test_the_loss_falls_in_an_own_transformer(tmp_path, monkeypatch):
    found = run("your_own_transformer", tmp_path, monkeypatch)
    curves = {name: curve[-1, 1] for name, curve in found["curves"].items()}
    assert curves["with"] < curves["without"] - 0.005
    assert np.isfinite(found["value"])


@pytest.mark.slow
def test_the_blocks_of_two_runs_are_compared(tmp_path, monkeypatch):
    found = run("what_your_blocks_look_like", tmp_path, monkeypatch)
    assert [one.label for one in found["report"].studies] == ["SiT", "DiverseDiT"]
    assert found["found"].shape == (2, 2)


@pytest.mark.slow
def test_a_release_becomes_a_diversedit(tmp_path, monkeypatch):
    found = run("from_a_release_to_a_diversedit", tmp_path, monkeypatch)
    before, start = found["before"], found["start"].sample(**found["SAMPLES"])
    assert np.abs(before.astype(int) - start.astype(int)).max() <= 1
    assert {"merges"} == found["start"].params.keys() - found["release"].params.keys()
    assert found["config"].model.skip == "release"
    check(found["xl2"](), ["model", "data", "codec"])  # the two lines that its first cell names
    shapes = [jax.tree.leaves(found[name].params)[0].shape for name in ("release", "trained")]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_elsewhere(name):
    cells = notebook(name)["cells"]
    assert f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/tools/examples/{name}.ipynb" in "".join(
        cells[0]["source"]
    )
    install = tagged(cells, "install")
    assert install is next(cell for cell in cells if cell["cell_type"] == "code")
    assert f"%pip install -q git+https://github.com/{REPOSITORY}\n" in "".join(install["source"]) + "\n"
    assert not [cell["id"] for cell in cells if cell is not install and "pip install" in "".join(cell["source"])]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_stores_can_be_shown(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 700_000
    cells = [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)], "not run in order, at once"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})], "no picture"
    for output in outputs:
        shown = {form: "".join(text) for form, text in output.get("data", {}).items() if form != "image/png"}
        text = re.sub(r"base64,[\w+/=]*", "", "\n".join([*shown.values(), *output.get("text", ())]))
        assert not re.search(r"Traceback|Warning\b|(?<![\w.])/(?!content/)\w+/", text), text[:2000]
