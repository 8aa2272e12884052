"""Show what the two parts of DiverseDiT do to the blocks of a small network: four settings, three seeds, one report.

    python -m tools.studies.blocks --out=runs/blocks

Trains a SiT on the digits: plain, with long residual connections, with the diversity loss, and with both. Then analyses
every checkpoint (see diversedit_jax/analyze.py) and writes OUT/report.html. The config is configs/digits.py, with 32
examples a step. The same command goes on with a stopped run, and keeps finished ones. Takes about 20 minutes on 2 CPU
cores.
"""

import time
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from diversedit_jax import analyze, train
from diversedit_jax.analysis.measure import Settings
from diversedit_jax.config import slot
from diversedit_jax.configs import digits
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import trained
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.progress import duration

STEPS = flags.DEFINE_integer("steps", 1500, "Training steps of every run.")
BATCH = flags.DEFINE_integer("batch_size", 32, "Examples of a step.")
EVERY = flags.DEFINE_integer("every", 250, "Steps between the checkpoints that are analysed.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of every setting.")
NUM = flags.DEFINE_integer("num", 1000, "Samples that are scored, at every second checkpoint.")
OUT = flags.DEFINE_string("out", None, "Directory of the runs and of the report.", required=True)
SETTINGS = {  # label: (folder, long residual connections, diversity loss)
    "SiT": ("sit", False, False),
    "+ long residuals": ("long_residuals", True, False),
    "+ diversity loss": ("diversity_loss", False, True),
    "DiverseDiT (both)": ("diversedit_both", True, True),
}


def config_of(seed: int, residuals: bool, diversity: bool) -> ConfigDict:
    """Make the config of one run."""
    config = digits.get_config()
    config.seed, config.total_steps, config.batch_size = seed, STEPS.value, BATCH.value
    if not residuals:
        config.model.skip = "none"
    if not diversity:
        config.losses = ConfigDict()
    config.checkpoint.update({"every": EVERY.value, "keep": 1, "keep_every": EVERY.value})
    config.samples.every = 0
    config.evaluators = ConfigDict({"digits": slot("evaluators", "digits", num=NUM.value)})
    config.evaluators.digits.every = 2 * EVERY.value
    config.log_every = EVERY.value
    return config


def main() -> None:
    """Train the runs that are not finished, then analyse all."""
    if STEPS.value % (2 * EVERY.value):
        raise ConfigError(f"--steps={STEPS.value}: must be a multiple of twice --every={EVERY.value}")
    out, started = Path(OUT.value).expanduser().absolute(), time.monotonic()
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))  # the seeds of a setting are one program
    found = []
    for label, (name, *changes) in SETTINGS.items():
        for seed in range(SEEDS.value):
            workdir = out / "runs" / f"{name}_{seed}"
            print(f"--- {label}, seed {seed}", flush=True)
            train.run(config_of(seed, *changes), workdir)
            found.append(trained.of_run(workdir, losses=True)._replace(label=label))
    analyze.run(found, out, Settings())
    print(f"done in {duration(time.monotonic() - started)}")


if __name__ == "__main__":
    cli.launch(main)
