"""Weights of public releases as a user meets them: converted, looked into, sampled from, and refused in one line."""

import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from diversedit_jax import sample
from diversedit_jax.runs import trained
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats.weights_file import write_safetensors
from tests import ROOT
from tests.reference import DATA


def tool(*arguments):
    command = [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_convert_and_inspect(tmp_path):
    there, back = tmp_path / "diffusers.safetensors", tmp_path / "back.safetensors"
    given = DATA / "official_dit.safetensors"
    done = tool(given, there, "--family=official_dit", "--to=diffusers_dit", "--heads=4")
    assert done.returncode == 0, done.stderr
    assert "diffusers_dit, " in done.stdout
    assert tool(there, back, "--to=official_dit", "--heads=4").returncode == 0
    expected = load_file(given)
    for name, array in load_file(back).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    seen = tool(DATA / "sit_diversedit.safetensors", "--inspect", "--heads=4")
    assert seen.returncode == 0, seen.stderr
    for words in (
        "sit: SiT of REPA",
        "skip          True",
        "depth         12",
        "merges/linear/kernel",
        "image size    8 x 8",
    ):
        assert words in seen.stdout, seen.stdout


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def crafted(tmp_path, kind):
    path = tmp_path / "model.pt"
    if kind == "malicious":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"ema": Evil()}))
    elif kind == "truncated":
        path.write_bytes((DATA / "sit_plain.safetensors").read_bytes()[:50_000])
    elif kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "misshapen":
        arrays = load_file(DATA / "sit_plain.safetensors")
        write_safetensors(path, arrays | {"blocks.3.mlp.fc1.bias": np.zeros(100, np.float32)})
    elif kind == "another family":
        write_safetensors(path, {"conv1.weight": np.zeros((3, 3), np.float32)})
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("malicious", "system"),
        ("misshapen", "blocks.3.mlp.fc1.bias has shape [100], wanted [128]"),
        pytest.param("truncated", "not a whole safetensors file", marks=pytest.mark.slow),
        pytest.param("empty", "is empty", marks=pytest.mark.slow),
        pytest.param("directory", "a folder without weights (it is empty)", marks=pytest.mark.slow),
        pytest.param("another family", "no family known has these arrays (conv1.weight", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_a_release_is_refused_in_one_line(tmp_path, kind, words):
    done = tool(crafted(tmp_path, kind), tmp_path / "out.safetensors", "--heads=4")
    assert done.returncode in (65, 78), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert not (ROOT / "executed").exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sit_diversedit", {"solver": "heun"}),
        pytest.param("official_sit", {"cfg_scale": 4.0, "guidance_channels": 3}, marks=pytest.mark.slow),
        pytest.param("official_dit", {}, marks=pytest.mark.slow),
        ("meanflow", {}),
        pytest.param("meanflow", {"solver": "euler", "cfg_scale": 2.0}, marks=pytest.mark.slow),
        pytest.param("uvit_class", {"cfg_scale": 1.4}, marks=pytest.mark.slow),
    ],
)
def test_a_release_samples_at_once(tmp_path, name, options):
    family = name if name.startswith("official") else "uvit" if name == "uvit_class" else None
    side = 8 if name == "meanflow" else None  # which stores no position table
    heads = 3 if name == "uvit_class" else 4
    opened = trained.of_release(DATA / f"{name}.safetensors", family, heads, sides=side)
    source = trained.drawing(opened, overrides={"steps": 3} | options)
    folder = sample.run(source, num=2, labels=[1, 7], out=tmp_path)
    with np.load(folder / "samples.npz") as file:
        assert file["arr_0"].shape == (2, 8, 8, 4)
        assert file["arr_0"].dtype == np.float32
        assert np.isfinite(file["arr_0"]).all()


@pytest.mark.slow
def test_a_meanflow_release_samples_in_one_step_by_default():
    chosen = {}, {"solver": "mean_flow", "steps": 1}, {"steps": 2}
    opened = trained.of_release(DATA / "meanflow.safetensors", heads=4, sides=8)
    sources = [trained.drawing(opened, overrides=given) for given in chosen]
    default, one, two = (s.sampler(s.params, s.frozen, np.array([1, 7]), 0) for s in sources)
    np.testing.assert_array_equal(default, one)
    assert np.abs(default - two).max() > 0.01


@pytest.mark.parametrize("name", ["sit_diversedit", "official_sit"])
def test_exported_files_load_strictly_into_torch(tmp_path, name):
    """A torch module with the reference's names takes the file with strict=True."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    arrays = load_file(DATA / f"{name}.safetensors")
    shapes = {key: array.shape for key, array in arrays.items()}
    release = releases.load(arrays, shapes, name if name.startswith("official") else None, 4)
    out = releases.export(release.params, release.family, release.arch, release.sides)
    write_safetensors(tmp_path / "out.safetensors", out)

    module = torch.nn.Module()
    for key in arrays:
        if key.startswith("projectors"):
            continue
        *path, leaf = key.split(".")
        place = module
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(leaf, torch.nn.Parameter(torch.empty(arrays[key].shape)))
    module.load_state_dict(load_torch(tmp_path / "out.safetensors"), strict=True)
    for key, value in module.state_dict().items():
        np.testing.assert_allclose(value.numpy(), arrays[key], atol=1e-6, err_msg=key)


@pytest.mark.slow
def test_importing_xl_takes_less_than_two_and_a_half_times_the_file(tmp_path):
    """In a process of its own, whose peak memory the system counts."""
    program = f"""
import resource, sys
import jax, numpy as np
from pathlib import Path
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.formats.weights_file import write_safetensors
path = Path({str(tmp_path / "xl.safetensors")!r})
if sys.argv[1] == "write":
    arch = releases.Architecture(28, 1152, 16, 2, 4, 4, 1000)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), releases.abstract(arch))
    write_safetensors(path, releases.export(params, "sit", arch, (32, 32)))
else:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    release, _ = releases.open_release(path)
    assert release.arch.depth == 28 and release.sides == (32, 32)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(peak * 1024 / path.stat().st_size)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for mode in ("write", "read"):
        done = subprocess.run(
            [sys.executable, "-c", program, mode],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
    ratio = float(done.stdout)
    assert ratio < 2.5, f"importing took {ratio:.2f} times the file"
