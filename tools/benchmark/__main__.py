"""Time several forms of one thing in turn, and compare them as ratios.

    python -m tools.benchmark train --config=configs/diversedit.py:b2 --compare="config=configs/sit.py:b2" --vs=torch
    python -m tools.benchmark sample --config=configs/diversedit.py:xl2 --compare="sampler.guidance_interval=(0,1)"
    python -m tools.benchmark loss --config=configs/diversedit.py:b2
    python -m tools.benchmark data --config=configs/diversedit.py:xl2 --pod=v5e-16
    python -m tools.benchmark eval --extractor=inception=FILE

train: the training step. sample: images from noise. loss: each auxiliary loss with its gradient. data: reading stored
data, beside the rate that a pod needs. eval: features, moments, distances. See tools/benchmark/KIND.py for the figures.

Weights and data are random: no file is needed. `--compare` adds a form, the config with other values: KEY=VALUE
KEY=VALUE ...; the first may be config=FILE. `--vs=torch` adds PyTorch to `train` or `sample` (`pip install torch`).
`--out=FILE.json` writes the figures, and a table to FILE.md. Run nothing else meanwhile: the record has the load.
"""

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.versions import versions
from tools.benchmark import timing

# The flags that each kind reads.
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
    if len(arguments) != 1:
        raise ConfigError(f"give one kind of benchmark: {', '.join(READS)}; given: {' '.join(arguments) or 'none'}")
    one_of("kind of benchmark", arguments[0], READS)
    (kind,), given = arguments, flags.FLAGS
    check(kind, given)
    if given.platform:
        jax.config.update("jax_platforms", PLATFORMS[given.platform])
    if given.vs:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both share the memory of a GPU
    jax.config.update("jax_enable_compilation_cache", False)  # else a time to compile may be one to read a file
    cli.silence()
    hardware = timing.hardware()  # before the benchmark itself makes load
    figures, table = import_module(f"tools.benchmark.{kind}").main(given)
    found = {"kind": kind, "command": timing.command(), "versions": versions(), **figures, "hardware": hardware}
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
        if given[name].value is not None:
            in_range(f"--{name}", given[name].value, 1)
    out = given["out"].value
    if out is not None and (Path(out).suffix != ".json" or not Path(out).parent.is_dir()):
        raise ConfigError(f"--out={out}: wanted FILE.json in an existing folder")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file; --config.KEY=VALUE changes a key.")
    flags.DEFINE_multi_string("compare", [], "Another form: KEY=VALUE KEY=VALUE ...; the first may be config=FILE.")
    flags.DEFINE_enum("vs", None, ["torch"], "Another implementation to time in the same run.")
    flags.DEFINE_enum("platform", None, list(PLATFORMS), "Platform of jax; by default its choice.")
    flags.DEFINE_integer("rounds", 7, "Rounds that count.")
    flags.DEFINE_integer("steps", None, "Steps of one timing; by default as many as take half a second.")
    flags.DEFINE_string("pod", "v5e-16", "The slice of TPUs that the data are for.")
    flags.DEFINE_float("mfu", 0.45, "The share of its peak that the slice reaches.")
    flags.DEFINE_string("extractor", None, "NAME=FILE or NAME=FILE,OPTION=VALUE; by default Inception without a file.")
    flags.DEFINE_integer("batch_size", 32, "Images at a time, over all devices.")
    flags.DEFINE_string("out", None, "FILE.json for the figures; FILE.md gets the table.")
    cli.launch(main, arguments=True)
