"""Benchmarks: forms of one thing timed in turn in one run, and compared as ratios.

    python -m tools.benchmark train --config=configs/diversedit_b2.py --compare="config=configs/sit_b2.py" --vs=torch
    python -m tools.benchmark sample --config=configs/diversedit_xl2.py --compare="sampler.guidance_interval=(0,1)"
    python -m tools.benchmark loss --config=configs/diversedit_b2.py
    python -m tools.benchmark data --config=configs/diversedit_xl2.py --pod=v5e-16
    python -m tools.benchmark eval --extractor=inception=FILE

`train`: the training step. `sample`: images from noise. `loss`: each auxiliary loss with its gradient, on given
features. `data`: reading what is stored, beside what a pod needs. `eval`: features, moments, distances. Weights and
data are random: no file is needed. `--compare` adds a form, the config with other values: KEY=VALUE KEY=VALUE ..., of
which the first may be config=FILE. `--vs=torch` adds PyTorch to a step or a sampler (`pip install torch`).
`--out=FILE.json` writes the figures, and FILE.md a table.

Nothing else should run meanwhile: the load before is in the record. Each kind's module, tools/benchmark_KIND.py, says
what its figures are.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.cli import silence

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
    sys.path.insert(0, str(Path(__file__).parents[1]))  # where it was started as a file
    timing, module = import_module("tools.timing"), import_module(f"tools.benchmark_{kind}")
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


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file; --config.KEY=VALUE changes a key.")
    flags.DEFINE_multi_string("compare", [], "KEY=VALUE KEY=VALUE ...: another form; config=FILE for another file.")
    flags.DEFINE_enum("vs", None, ["torch"], "Another implementation, in the same run.")
    flags.DEFINE_enum("platform", None, list(PLATFORMS), "Where jax runs; by default where it would.")
    flags.DEFINE_integer("rounds", 7, "Rounds that count.")
    flags.DEFINE_integer("steps", None, "Steps in one timing; by default as many as take half a second.")
    flags.DEFINE_string("pod", "v5e-16", "The slice whose need data are compared with.")
    flags.DEFINE_float("mfu", 0.45, "The part of their peak at which its chips compute.")
    flags.DEFINE_string("extractor", None, "NAME=FILE, NAME=FILE,OPTION=VALUE; by default Inception without a file.")
    flags.DEFINE_integer("batch_size", 32, "Images at a time, over all devices.")
    flags.DEFINE_string("out", None, "FILE.json to write the figures to; FILE.md gets the table.")
    cli.launch(main, arguments=True)
