"""The house: who imports whom, what the wheel holds, and what lies at the top of the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "diversedit_jax"

# The rooms from the ground up: a module or folder directly in diversedit_jax/ ("" is the package itself), and the
# third-party packages that come in there. A room uses rooms below it, and packages that have come in.
FLOORS = {
    "": "",
    "errors": "",
    "registry": "",
    "reading": "numpy",
    "shapes": "jax jaxtyping",
    "api": "numpy",
    "arrays": "",
    "sharding": "",
    "conditioning": "",
    "metrics": "",
    "diffusion": "",
    "losses": "",
    "objectives": "",
    "runtime": "PIL absl tqdm tensorboardX clu",
    "models": "flax",
    "weights": "safetensors ml_dtypes",
    "data": "grain tensorflow_datasets sklearn array_record",
    "config": "ml_collections",
    "encoders": "",
    "codecs": "",
    "training": "optax orbax",
    "sampling": "",
    "runs": "",
    "evaluation": "matplotlib",
    "analysis": "",
    "evaluators": "scipy",
    "sample": "",
    "evaluate": "",
    "analyze": "",
    "network": "",
    "train": "",
    "__main__": "",
}
ROOMS = list(FLOORS)
JAX_ALONE = ROOMS[: ROOMS.index("runtime")]
GENERAL = {"train", "training", "sampling", "runs", "analysis"}  # rooms that serve every method
# What single modules may import beside that, inside of the function that needs it.
EXCEPTIONS = {
    "diversedit_jax.diffusion.solvers": {"diffrax"},
    "diversedit_jax.weights.hub": {"huggingface_hub"},
    "diversedit_jax.data.clip_tokenizer": {"tokenizers"},
    "diversedit_jax.data.videos": {"av"},
    "diversedit_jax.weights.formats.orbax_folder": {"orbax", "tensorstore"},
    "diversedit_jax.weights.formats.tf_graph": {"google"},
    "diversedit_jax.data.lightningdit": {"safetensors"},
}
# Data sets are numpy on the host (though grain itself loads jax). Of weights they use the readers of files alone.
DATA_NEVER = {"jax", "flax"}
DATA_MAY_USE = {"", "errors", "registry", "reading", "api", "data", "weights"}
FILES = [f"diversedit_jax.weights.formats.{name}" for name in ("weights_file", "numpy_pickle")]

NEVER = {"configs", "launch", "tests", "tools", "tensorflow", "torch"}

# Import name: distribution, where they differ by more than - and _.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}

TOP_LEVEL = {
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "configs",
    "constraints.txt",
    "diversedit_jax",
    "launch",
    "pyproject.toml",
    "setup.py",
    "tests",
    "tools",
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    """diversedit_jax/losses/repa.py -> diversedit_jax.losses.repa"""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def part(module: str) -> str:
    """The part of the package that a module lives in: diversedit_jax.losses.repa -> losses"""
    return [*module.split("."), ""][1]


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports anywhere in it, also inside of functions."""
    package = dotted(path).split(".")[: None if path.name == "__init__.py" else -1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module or ""]).strip(".")
            # `from diversedit_jax import registry` imports the module registry, `... import __version__` only a name.
            modules = {f"{base}.{alias.name}" for alias in node.names} & set(map(dotted, MODULES))
            names.update(modules or {base})
    return frozenset(names)


def third_party(path: Path) -> set[str]:
    """Top-level names that a file imports from outside of the standard library and the package."""
    return {name.partition(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"diversedit_jax"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_its_own_and_lower_rooms_only(path):
    name, room = dotted(path), part(dotted(path))
    assert room in FLOORS, f"diversedit_jax.{room} is not in the house yet: place it in FLOORS of {__file__}"
    below = ROOMS[: ROOMS.index(room) + 1]
    packages = {package for lower in below for package in FLOORS[lower].split()} | EXCEPTIONS.get(name, set())
    ours = {module for module in imports(path) if module.partition(".")[0] == "diversedit_jax"}
    if room == "data":
        packages -= DATA_NEVER
        below = DATA_MAY_USE
        assert not (found := {m for m in ours if part(m) == "weights"} - set(FILES)), f"{name} may not use {found}"
    assert not (found := third_party(path) & NEVER), f"{name} imports {found}: the package never does"
    assert not (found := third_party(path) - packages), f"{name} may not import {found}"
    assert not (found := set(map(part, ours)) - set(below)), f"{name} may not use diversedit_jax.{found}"


METHODS = (
    r"\b(repa|reg|mean_flow|sra|dispersive|merges|shallow|ddpm|diversedit|second_time|token_width|num_timesteps)\b"
)


@pytest.mark.parametrize("path", [path for path in MODULES if part(dotted(path)) in GENERAL], ids=dotted)
def test_what_serves_every_method_names_none(path):
    found = re.findall(METHODS, path.read_text(encoding="utf-8"))
    assert not found, f"{dotted(path)} names {found}: ask the contract (api.py) instead"


@pytest.mark.parametrize("folder", ["diversedit_jax", "tools", "configs"])
def test_no_function_is_longer_than_a_screen_or_two(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{dotted(path)} has no docstring"


def loaded_after_importing(modules: list[str]) -> set[str]:
    """Top-level modules that a fresh Python has loaded after it imported these, where torch cannot be imported.

    tensorboardX loads torch where it is installed.
    """
    code = """if True:
        import importlib, sys
        class NoTorch:
            def find_spec(name, *more):
                if name == "torch":
                    raise ImportError(name)
        sys.meta_path.insert(0, NoTorch)
        for module in sys.argv[1:]:
            importlib.import_module(module)
        print("LOADED", *sys.modules)
    """
    process = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return {name.partition(".")[0] for name in process.stdout.partition("LOADED")[2].split()}


def test_readers_of_files_need_numpy_alone():
    found = loaded_after_importing(FILES) & {"jax", "flax", "orbax"}
    assert not found, f"importing {FILES} loads {found}"


def test_the_lowest_rooms_need_jax_alone():
    """The losses run in anybody's training code, whatever its framework."""
    modules = [dotted(path) for path in MODULES if part(dotted(path)) in JAX_ALONE]
    assert "diversedit_jax.losses" in modules
    found = loaded_after_importing(modules) & {"flax", "optax", "orbax", "clu", "grain", "diffrax", "PIL", "absl"}
    assert not found, f"importing the lowest rooms loads {found}"


def test_neither_tensorflow_nor_torch_is_loaded():
    assert "tensorflow" not in loaded_after_importing(sorted(map(dotted, MODULES)))


def setup_argument(name: str):
    """A literal keyword argument of setup() in setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(n.value) for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == name)


def distribution(requirement: str) -> str:
    """The normal form of a distribution's name: `ml_collections>=1.1` -> ml-collections"""
    return re.match(r"[\w.-]+", requirement)[0].replace("_", "-").lower()


def test_what_the_package_imports_is_declared():
    extras = setup_argument("extras_require")  # asked for where they are missing
    optional = extras["hub"] + extras["text"] + extras["video"]
    declared = set(map(distribution, setup_argument("install_requires") + optional))
    imported = set.union(*map(third_party, MODULES))
    missing = {name for name in imported if distribution(DISTRIBUTIONS.get(name, name)) not in declared}
    assert not missing, f"imported, but not in install_requires of setup.py: {missing}"


def test_what_is_declared_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {distribution(line) for line in lines if not line.startswith("#")}
    declared = setup_argument("install_requires") + setup_argument("extras_require")["test"]
    assert not (missing := set(map(distribution, declared)) - pinned), f"not in constraints.txt: {missing}"


def test_every_folder_with_modules_is_a_package():
    bare = {str(path.parent.relative_to(ROOT)) for path in MODULES if not (path.parent / "__init__.py").exists()}
    assert not bare, f"without __init__.py, and so left out of the wheel: {bare}"


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    # From a copy: setuptools leaves build/ behind, and would take stale modules from one that is there.
    source = tmp_path / "source"
    source.mkdir()
    for name in TOP_LEVEL:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert process.returncode == 0, process.stdout + process.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = source / PACKAGE.name
    files = [*package.rglob("*"), *package.glob("configs/*.py")]  # configs is a link, which rglob does not follow
    files = [path for path in files if path.is_file() and path.name != "README.md"]
    wanted = {path.relative_to(source).as_posix() for path in files}
    assert held == wanted, f"missing: {sorted(wanted - held)}; too many: {sorted(held - wanted)}"
    metadata = next(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA"))
    links = re.findall(r"\]\(([^)]*)\)", zipfile.ZipFile(wheel).read(metadata).decode())
    assert links, "the front page has links"
    assert not [link for link in links if not link.startswith("https://")], "pages of packages cannot follow these"


def test_the_top_of_the_repository_is_tidy():
    process = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if process.returncode != 0:
        pytest.skip("not a git repository")
    found = {name.partition("/")[0] for name in process.stdout.splitlines()}
    extra = {name for name in found - TOP_LEVEL if not name.startswith(".")}
    assert not extra, f"{extra} at the top of the repository: find a folder for it"
