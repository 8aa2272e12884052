"""What the two parts of DiverseDiT do to the blocks of a small network: four settings, three seeds, one report.

    python -m tools.studies.blocks --out=runs/blocks

Trains a SiT on the digits alone, with long residual connections, with the diversity loss, and with both, as
configs/digits.py does but with 32 examples a step, and analyses every checkpoint (see diversedit_jax/analyze.py). The
report is OUT/report.html. Finished runs are kept, and one that was stopped goes on: the same command ends in the same
numbers. 17 minutes on 2 CPU cores, 22 where they had other work.
"""

import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import digits
from diversedit_jax import analyze, train
from diversedit_jax.analysis.measure import Settings
from diversedit_jax.config import slot
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import trained
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.progress import duration

STEPS = flags.DEFINE_integer("steps", 1500, "Training steps of every run.")
BATCH = flags.DEFINE_integer("batch_size", 32, "Examples of a step: few, so that many steps fit into the time.")
EVERY = flags.DEFINE_integer("every", 250, "Steps between the checkpoints that are analysed.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of every setting.")
NUM = flags.DEFINE_integer("num", 1000, "Samples that are scored, at every second checkpoint.")
OUT = flags.DEFINE_string("out", None, "Directory of the runs and of the report.", required=True)


def plain(config: ConfigDict) -> None:
    """Neither part."""
    config.model.skip = "none"
    config.losses = ConfigDict()


def residuals(config: ConfigDict) -> None:
    """The long residual connections alone."""
    config.losses = ConfigDict()


def diversity(config: ConfigDict) -> None:
    """The diversity loss alone."""
    config.model.skip = "none"


def both(config: ConfigDict) -> None:
    """As configs/digits.py has it."""


SETTINGS: dict[str, Callable[[ConfigDict], None]] = {
    "SiT": plain,
    "+ long residuals": residuals,
    "+ diversity loss": diversity,
    "DiverseDiT (both)": both,
}


def config_of(change: Callable[[ConfigDict], None], seed: int) -> ConfigDict:
    """The config of one run."""
    config = digits.get_config()
    config.seed, config.total_steps, config.batch_size = seed, STEPS.value, BATCH.value
    change(config)
    config.checkpoint.update({"every": EVERY.value, "keep": 1, "keep_every": EVERY.value})
    config.samples.every = 0
    config.evaluators = ConfigDict({"digits": slot("evaluators", "digits", num=NUM.value)})
    config.evaluators.digits.every = 2 * EVERY.value
    config.log_every = EVERY.value
    return config


def main() -> None:
    """Train what is not trained yet, then analyse all."""
    if STEPS.value % (2 * EVERY.value):
        raise ConfigError(f"--steps={STEPS.value}: must be a multiple of twice --every={EVERY.value}")
    out, started = Path(OUT.value).expanduser().absolute(), time.monotonic()
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))  # the seeds of a setting are one program
    found = []
    for label, change in SETTINGS.items():
        for seed in range(SEEDS.value):
            name = label.strip("+ ").replace(" ", "_").replace("(", "").replace(")", "").lower()
            workdir = out / "runs" / f"{name}_{seed}"
            print(f"--- {label}, seed {seed}", flush=True)
            train.run(config_of(change, seed), workdir)
            found.append(trained.of_run(workdir)._replace(label=label))
    analyze.run(found, out, Settings())
    print(f"done in {duration(time.monotonic() - started)}")


if __name__ == "__main__":
    cli.launch(main)
