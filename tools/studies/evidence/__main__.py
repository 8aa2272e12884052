"""Compare methods on real images, over several seeds, with statistics that are said in advance: one page, one table.

    python -m tools.studies.evidence --out=runs/evidence                 # meant for 2 CPU cores and an hour
    python -m tools.studies.evidence --size=gpu --out=runs/evidence_gpu  # meant for one H100 or H200 and 9 minutes
    python -m tools.studies.evidence --size=gpu_cifar10 --data_dir=DIR --out=runs/evidence_cifar10
    python -m tools.studies.evidence --rows=forms --tune --out=runs/evidence  # further forms, on the seed of tuning

Trains the rows of `settings.ROWS` on Fashion-MNIST (on Debian and Ubuntu: apt-get install dataset-fashion-mnist) or
CIFAR-10, first each with two learning rates on a seed that is not used again, then with the seeds that count. Rows take
turns. The same command goes on after a stop, and adds seeds or rows: OUT keeps every result by the digest of its
setting, so results of several machines can be copied together. Writes OUT/report.html and OUT/table.md.
"""

import math
import os
import sys
import time

import jax
from absl import flags

from diversedit_jax.config import slot
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.runtime import cli, files
from tools.studies.evidence import report
from tools.studies.evidence.settings import FORMS, ROWS, SIZES
from tools.studies.evidence.study import OutOfTime, Study

SIZE = flags.DEFINE_string("size", "cpu", f"Size of the study: {', '.join(SIZES)}. `small` only tries whether it runs.")
OUT = flags.DEFINE_string("out", None, "Folder of results and of the report.", required=True)
ROW = flags.DEFINE_list("rows", None, f"Rows: {', '.join(ROWS)}, or `forms`; by default those of the size.")
TUNE = flags.DEFINE_bool("tune", False, "Only train with the seed that chooses learning rates.")
SEEDS = flags.DEFINE_list("seeds", None, "Seeds, below 1000; by default 0, 1, ..., as many as the size says.")
MINUTES = flags.DEFINE_float("minutes", None, "Begin no turn after so many minutes; write the report.")
DATA = flags.DEFINE_string("data_dir", None, "Where the data lie; Fashion-MNIST: by default where Debian has it.")
STATES = flags.DEFINE_bool("states", True, "Save the state of runs after each turn, to go on with them after a stop.")
REPORT = flags.DEFINE_bool("report", False, "Only write the report of all that OUT holds of this size.")


def main() -> None:
    """Tune, compare, and write the report."""
    started = time.monotonic()
    size = SIZES[one_of("--size", SIZE.value, SIZES)]
    given = [name for row in ROW.value or size.rows for name in (FORMS if row == "forms" else (row,))]
    rows = tuple(one_of("--rows", row, ROWS) for row in given)
    seeds = [cli.literal(seed) for seed in SEEDS.value or map(str, range(size.seeds))]
    for seed in seeds:
        in_range("--seeds", seed, 0, 999)
    name, options = size.data
    options = options | ({} if DATA.value is None else {"data_dir": DATA.value})
    if slot("data", name, **options)["data_dir"] is None:
        raise ConfigError(f"--size={SIZE.value} wants --data_dir: the folder where {name} lies")
    size = size._replace(data=(name, options))
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)  # a core for each run is faster than all for one
    out = files.writable_folder(OUT.value, "--out")
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    deadline = started + 60 * MINUTES.value if MINUTES.value else math.inf
    told = (argument for argument in sys.argv[1:] if not argument.startswith(("--out", "--data_dir")))
    command = " ".join(["python -m tools.studies.evidence", *told])
    study = Study(size, out, states=STATES.value, deadline=deadline, command=command)
    try:
        if not REPORT.value:
            study.tune(rows)
            if not TUNE.value:
                study.compare(rows, seeds)
    except OutOfTime:
        print(f"the {MINUTES.value:g} minutes are over; the same command goes on")
    report.write(study)


if __name__ == "__main__":
    cli.launch(main)
