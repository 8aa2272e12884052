"""What the numbers of a run depend on besides its config: versions, commit, devices, parameters."""

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
    """What the numbers of a run depend on: Python, libraries, this package and its git commit, and the devices."""
    found = {"python": platform.python_version(), "diversedit_jax": diversedit_jax.__version__}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    if commit := git_commit():
        found["git_commit"] = commit
    devices = jax.devices()
    return found | {"backend": jax.default_backend(), "devices": f"{len(devices)} x {devices[0].device_kind}"}


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty` if changed; None outside of one."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside someone else's checkout is not ours
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def parameter_overview(params: Any) -> str:
    """A table of the names, shapes, dtypes and sizes of a pytree of arrays or ShapeDtypeStructs, and the total."""
    return clu_overview.get_parameter_overview(by_name(params), include_stats=False)
