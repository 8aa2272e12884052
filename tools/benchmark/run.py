"""One benchmark from its flags: measured, printed, written."""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import jax
from absl import flags

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion
from diversedit_jax.runtime.cli import silence
from tools.benchmark import timing

# by kind, the flags that it reads
READS = {
    "train": ("config", "compare", "vs", "steps", "rounds"),
    "sample": ("config", "compare", "vs", "rounds"),
    "loss": ("config", "compare", "steps", "rounds"),
    "data": ("config", "pod", "mfu", "rounds"),
    "eval": ("extractor", "batch_size", "rounds"),
}
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    if len(arguments) != 1 or arguments[0] not in READS:
        wanted = suggestion(arguments[0], READS) if arguments else f"known: {', '.join(READS)}"
        raise ConfigError(f"wanted one kind of benchmark, given {' '.join(arguments) or 'none'!r}; {wanted}")
    (kind,) = arguments
    given = flags.FLAGS
    check(kind, given)
    if given.platform:
        jax.config.update("jax_platforms", PLATFORMS[given.platform])
    if given.vs:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both share the memory of a GPU
    jax.config.update("jax_enable_compilation_cache", False)  # else a time to compile may be one to read a file
    silence()
    module = import_module(f"tools.benchmark.{kind}")
    machine = timing.hardware()  # before there is load from here
    figures, table = module.main(given)
    found = timing.record(kind, **figures) | {"hardware": machine}
    print(f"{timing.about(found)}\n\n{table}")
    if given.out:
        timing.write(Path(given.out), found, table)


def check(kind: str, given: Mapping[str, flags.Flag]) -> None:
    """Raise ConfigError for a flag that is missing, wrong, or not read by this kind."""
    for name in sorted({name for names in READS.values() for name in names} - set(READS[kind])):
        if given[name].present:
            raise ConfigError(f"--{name} is not read by `{kind}`, which reads {', '.join(READS[kind])}")
    if "config" in READS[kind] and given["config"].value is None:
        raise ConfigError("--config is required")
    for name in ("rounds", "steps"):
        if given[name].value is not None and given[name].value < 1:
            raise ConfigError(f"--{name}={given[name].value}: must be at least 1")
    out = given["out"].value
    if out is not None and (Path(out).suffix != ".json" or not Path(out).parent.is_dir()):
        raise ConfigError(f"--out={out}: wanted FILE.json in a folder that exists")
