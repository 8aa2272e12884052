"""Benchmarks: forms of one thing timed in turn in one run, and compared as ratios.

    python -m tools.benchmark train --config=configs/diversedit.py:b2 --compare="config=configs/sit.py:b2" --vs=torch
    python -m tools.benchmark sample --config=configs/diversedit.py:xl2 --compare="sampler.guidance_interval=(0,1)"
    python -m tools.benchmark loss --config=configs/diversedit.py:b2
    python -m tools.benchmark data --config=configs/diversedit.py:xl2 --pod=v5e-16
    python -m tools.benchmark eval --extractor=inception=FILE

`train`: the training step. `sample`: images from noise. `loss`: each auxiliary loss with its gradient, on given
features. `data`: reading what is stored, beside what a pod needs. `eval`: features, moments, distances. Weights and
data are random: no file is needed. `--compare` adds a form, the config with other values: KEY=VALUE KEY=VALUE ..., of
which the first may be config=FILE. `--vs=torch` adds PyTorch to a step or a sampler (`pip install torch`).
`--out=FILE.json` writes the figures, and FILE.md a table.

Nothing else should run meanwhile: the load before is in the record. Each kind's module, tools/benchmark/KIND.py, says
what its figures are.
"""

from absl import flags
from ml_collections import config_flags

from diversedit_jax.runtime import cli
from tools.benchmark.run import PLATFORMS, main

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
