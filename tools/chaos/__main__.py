"""Break small runs on purpose, and check that each ends like an undisturbed run or says why it cannot.

    python -m tools.chaos --out=DIR [--kills=100] [--topologies=20] [--attacks=200] [--json=FILE]

A DiverseDiT 16 wide trains on the digits and saves every few steps.

kills: SIGKILL or SIGTERM, often during a save, with and without data workers; then a new start. After each kill no
complete checkpoint is missing, the newest restores with its checksums, no process is left, and the next start resumes
there. At its end a run has the arrays and losses of the undisturbed run, to the bit. Then another run begins.
topologies: a run continues a few steps at a time, each time on another mesh and number of devices and processes. The
losses equal those of an undisturbed run to 1e-4.
damages: files cut off, emptied, removed or with a flipped bit, read-only directories, full disks.
attacks: closed pipes, missing permissions, paths with special characters, another `keep`, SIGTERM during an evaluation,
other data, several starts at once. Nothing that was saved is lost, and each error is one line. At its end a run has the
arrays and losses of the undisturbed run, to the bit.

The first failure ends the program with code 1; DIR holds the runs. For Linux. A whole test took an hour and a half on 2
CPU cores with other work.
"""

import os
import random
import tempfile
import time
from pathlib import Path

import jax
from absl import flags

from diversedit_jax.registry import in_range
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import write_json
from diversedit_jax.runtime.progress import duration
from diversedit_jax.runtime.versions import versions
from tools.chaos.attack import attacked
from tools.chaos.disturb import damaged, killed, moved, table, to_end

if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Directory for the runs; made if missing.", required=True)
    flags.DEFINE_integer("kills", 100, "Number of kills.")
    flags.DEFINE_integer("topologies", 20, "Number of other layouts on which a run continues.")
    flags.DEFINE_bool("damages", True, "Whether to damage runs.")
    flags.DEFINE_integer("attacks", 200, "Number of attacks on what surrounds a run.")
    flags.DEFINE_integer("seed", 0, "Seed of the moments, signals and places.")
    flags.DEFINE_string("json", None, "File to write the figures to.")

    def main() -> None:
        """Disturb, compare, print, write."""
        given = {name: flags.FLAGS[name].value for name in ("kills", "topologies", "damages", "attacks", "seed")}
        for name in ("kills", "topologies", "attacks"):
            in_range(f"--{name}", given[name], 0)
        out = Path(flags.FLAGS.out).expanduser().absolute()
        out.mkdir(parents=True, exist_ok=True)
        out = Path(tempfile.mkdtemp(dir=out, prefix="chaos-"))
        jax.config.update("jax_platforms", "cpu")
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),  # a new start need not compile again
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(out / "data"),
        }
        begin, rng = time.monotonic(), random.Random(given["seed"])
        straight = out / "undisturbed"
        to_end(straight)
        campaigns = {"topologies": lambda: moved(out, given["topologies"], rng)} if given["topologies"] else {}
        campaigns |= {"damages": lambda: damaged(out, straight, rng)} if given["damages"] else {}
        attacks = lambda: attacked(out, straight, given["attacks"], rng)  # noqa: E731
        campaigns |= {"attacks": attacks} if given["attacks"] else {}
        campaigns |= {"kills": lambda: killed(out, straight, given["kills"], rng)} if given["kills"] else {}
        found = {}
        for name, campaign in campaigns.items():
            found[name] = campaign()
            if flags.FLAGS.json:  # now, because the next campaign may fail
                figures = {"versions": versions() | {"cores": os.cpu_count()}, "flags": given}
                write_json(Path(flags.FLAGS.json), figures | {"seconds": round(time.monotonic() - begin)} | found)
        print(f"{table(found)}\nall as it should be, in {duration(time.monotonic() - begin)}")

    cli.launch(main)
