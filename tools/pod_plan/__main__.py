"""Plan a run on a TPU slice, without a TPU: does it fit, how fast may it be, how long does it take.

    python -m tools.pod_plan --config=configs/diversedit.py:xl2 --topology=v5e-16 --config.mesh.fsdp=16 \\
        --compare="model.remat=full" --compare="topology=v5p-32 batch_size=512" --json=plan.json

The TPU compiler of the package libtpu (`pip install "libtpu==0.0.42.*"`, 205 MB, terms of Google Cloud) compiles the
programs of the run: training step, initialisation, sampling, checksum of a save. Arrays are abstract: it needs no data,
no weights, no TPU. Encoders without a file get their published size. Each number has its source:

    compiler   libtpu's facts on the compiled program: memory, whether it fits, cycles
    counted    FLOPs in the traced step; bytes of memory and between chips in the compiled program's text
    estimated  times, and figures that follow from them: see `estimate`. No TPU has confirmed them.

`--compare` adds a row for the config with other values, KEY=VALUE KEY=VALUE .... Keys may be `topology` and `slices`,
and the first may be `config=FILE`. If the config does not fit, the usual remedies are tried in turn.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from diversedit_jax import config as configs
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.runtime import cli
from tools.benchmark import timing, variants
from tools.benchmark.timing import say
from tools.pod_plan import plan as pod_plan
from tools.pod_plan import tpu
from tools.pod_plan.plan import ENVIRONMENT, PROGRAMS, Plan


def main() -> None:
    """Compile, estimate, print."""
    given = flags.FLAGS
    if find_spec("libtpu") is None:
        raise ConfigError('plans need the TPU compiler: pip install "libtpu==0.0.42.*" (205 MB, terms of Google Cloud)')
    in_range("--efficiency", given.efficiency, above=0, high=1)
    for name in given.programs:
        one_of("--programs", name, PROGRAMS)
    if "train" not in given.programs:
        raise ConfigError(f"--programs={','.join(given.programs)} must contain train")
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])  # read when jax was imported
    hardware = timing.hardware()
    first = Plan("", configs.copied(given.config), tpu.parse(given.topology), given.slices)
    rows = []

    def look(plan: Plan, programs: Sequence[str]) -> bool:
        say(f"{plan.place.named} x {plan.slices}: {plan.words or 'the config'}")
        try:
            found = pod_plan.in_process(plan, programs, given.timeout)
        except RunError as error:
            if plan is first:
                raise
            say(f"left out: {error}")
            return False
        rows.append(pod_plan.row_of(plan, found, given.efficiency))
        return rows[-1]["fits"]

    if not look(first, given.programs):
        for words in pod_plan.remedies(first) if given.suggest else []:
            if look(pod_plan.varied(first, words), given.programs):
                break
    suggested = rows[-1]
    for words in given.compare:
        look(pod_plan.varied(first, words, variants.overrides()), ["train"])
    print(pod_plan.details(suggested, given.efficiency), end="\n\n")
    print(pod_plan.table(rows))
    if len(rows) > 1 and rows[0] is not suggested:
        options = " ".join(f"--config.{word}" for word in suggested["setting"].split())
        print(f"\nthe config does not fit; {'this fits: ' + options if suggested['fits'] else 'no remedy helps'}")
    if given.json:
        pod_plan.record(Path(given.json), timing.command(), rows, given.efficiency, hardware)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file; --config.KEY=VALUE changes a key.")
    flags.DEFINE_string("topology", None, "Slice, such as v5e-16, v5p:4x4x4, v4-32.")
    flags.DEFINE_integer("slices", 1, "Number of such slices.")
    flags.DEFINE_multi_string("compare", [], "KEY=VALUE KEY=VALUE ...: another row, with other values.")
    flags.DEFINE_list("programs", list(PROGRAMS), "Programs to compile for the config; other rows: the training step.")
    flags.DEFINE_bool("suggest", True, "Try remedies if the config does not fit.")
    flags.DEFINE_float("efficiency", 0.5, "Share of the peak that products are assumed to reach.")
    flags.DEFINE_float("timeout", 1800.0, "Seconds for the programs of a row.")
    flags.DEFINE_string("json", None, "File to add the figures to.")
    flags.mark_flags_as_required(["config", "topology"])
    cli.launch(main)
