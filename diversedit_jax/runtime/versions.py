"""What the results of a run depend on, besides its config: versions, commit, devices, parameters."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview as clu_overview

import diversedit_jax
from diversedit_jax.sharding import by_name

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "libtpu")


def versions() -> dict[str, str]:
    """Python, libraries, this package, the git commit of its checkout (-dirty if it has changes), and the devices."""
    found = {"python": platform.python_version(), "diversedit_jax": diversedit_jax.__version__}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails if we are installed in another's checkout
        if commit := git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"):
            found["git_commit"] = commit
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return found | {"backend": jax.default_backend(), "devices": devices}


def parameter_count(params: Any) -> int:
    """The number of elements of a pytree of arrays or ShapeDtypeStructs."""
    return int(clu_overview.count_parameters(by_name(params)))


def parameter_overview(params: Any) -> str:
    """A table of the names, shapes, dtypes and sizes of a pytree of arrays or ShapeDtypeStructs, and the total."""
    return clu_overview.get_parameter_overview(by_name(params), include_stats=False)
