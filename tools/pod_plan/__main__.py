"""What a run takes on a TPU slice, without a TPU: does it fit, how fast may it be, how long does it take.

    python -m tools.pod_plan --config=configs/diversedit.py:xl2 --topology=v5e-16 --config.mesh.fsdp=16 \\
        --compare="model.remat=full" --compare="topology=v5p-32 batch_size=512" --json=plan.json

The programs of a run (training step, initialisation, sampling, the checksum of a save) are compiled for the slice by
the TPU compiler of the package libtpu (`pip install "libtpu==0.0.42.*"`, 205 MB, terms of Google Cloud), as a run
compiles them, with abstract arrays: no data, no weights, no TPU. Encoders without a file stand there in the published
size. Each number says where it comes from:

    compiler   what libtpu says of the compiled program: memory, whether it fits, cycles
    counted    FLOPs in the traced step; bytes of memory and between chips in the compiled program's text
    estimated  times, and what follows from them: see `estimate`. No TPU has confirmed them.

`--compare` adds a row for the config with other values, KEY=VALUE KEY=VALUE ..., `topology` and `slices` among the
keys, and `config=FILE` as the first for another file. Where the config does not fit, what usually helps is tried in
turn, until it does.
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
from diversedit_jax.runtime import cli
from tools.benchmark import timing, variants
from tools.benchmark.timing import say
from tools.pod_plan import tpu
from tools.pod_plan.plan import (
    ENVIRONMENT,
    MISSING,
    PROGRAMS,
    Plan,
    details,
    in_process,
    record,
    remedies,
    row_of,
    table,
    varied,
)


def main() -> None:
    """Compile, estimate, print."""
    given = flags.FLAGS
    if find_spec("libtpu") is None:
        raise ConfigError(MISSING)
    if not 0 < given.efficiency <= 1:
        raise ConfigError(f"--efficiency={given.efficiency}: must be in (0, 1]")
    if unknown := set(given.programs) - set(PROGRAMS) or ("train" not in given.programs and {"no train"}):
        raise ConfigError(f"--programs: {', '.join(sorted(unknown))}: wanted train, and any of {', '.join(PROGRAMS)}")
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", ENVIRONMENT["JAX_PLATFORMS"])  # read when jax was imported
    hardware = timing.hardware()
    first = Plan("", configs.copied(given.config), tpu.parse(given.topology), given.slices)
    rows = []

    def look(plan: Plan, programs: Sequence[str]) -> bool:
        say(f"{plan.place.named} x {plan.slices}: {plan.words or 'the config'}")
        try:
            found = in_process(plan, programs, given.timeout)
        except RunError as error:
            if plan is first:
                raise
            say(f"left out: {error}")
            return False
        rows.append(row_of(plan, found, given.efficiency))
        return rows[-1]["fits"]

    if not look(first, given.programs):
        for words in remedies(first) if given.suggest else []:
            if look(varied(first, words), given.programs):
                break
    suggested = rows[-1]
    for words in given.compare:
        look(varied(first, words, variants.overrides()), ["train"])
    print(details(suggested, given.efficiency), end="\n\n")
    print(table(rows))
    if len(rows) > 1 and rows[0] is not suggested:
        options = " ".join(f"--config.{word}" for word in suggested["setting"].split())
        print(f"\nthe config does not fit; {'this does: ' + options if suggested['fits'] else 'nor does all of this'}")
    if given.json:
        record(Path(given.json), timing.command(), rows, given.efficiency, hardware)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file; --config.KEY=VALUE changes a key.")
    flags.DEFINE_string("topology", None, "Slice, such as v5e-16, v5p:4x4x4, v4-32.")
    flags.DEFINE_integer("slices", 1, "How many of them.")
    flags.DEFINE_multi_string("compare", [], "KEY=VALUE KEY=VALUE ...: another row, with other values.")
    flags.DEFINE_list("programs", list(PROGRAMS), "What is compiled for the config; for other rows the training step.")
    flags.DEFINE_bool("suggest", True, "Where the config does not fit, look for what does.")
    flags.DEFINE_float("efficiency", 0.5, "Share of the peak that products are assumed to reach.")
    flags.DEFINE_float("timeout", 1800.0, "Seconds for the programs of a row.")
    flags.DEFINE_string("json", None, "File to add the figures to.")
    flags.mark_flags_as_required(["config", "topology"])
    cli.launch(main)
