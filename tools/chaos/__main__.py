"""Break small runs on purpose, again and again, and check that each ends as if nothing had happened, or says why not.

    python -m tools.chaos --out=DIR [--kills=100] [--topologies=20] [--json=FILE]

A DiverseDiT 16 wide trains on the digits and saves every few steps. An undisturbed run is what all is compared with.

kills: SIGKILL or SIGTERM, often while a checkpoint is being written, with and without data workers, and a new start,
until all are spent; runs that reach their end meanwhile are followed by new ones. After every kill no complete
checkpoint is missing, the newest restores with the right checksums, no process is left; the next start resumes there.
At the end arrays and logged losses equal those of the undisturbed run to the bit.
topologies: a run that goes on some steps at a time, each time on another mesh and number of devices and processes.
The losses equal those of an undisturbed run to 1e-4.
damages: files that are cut off, emptied, removed or have a flipped bit, directories that are read-only, full disks.

It stops at the first thing that is not as it should be, with code 1; what the run left is then in DIR. For Linux. All
of it took 39 minutes on 2 CPU cores that had other work.
"""

import json
import os
import random
import tempfile
import time
from pathlib import Path

import jax
from absl import flags

from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.progress import duration
from diversedit_jax.runtime.versions import versions
from tools.chaos.disturb import damaged, killed, moved, table, to_end

if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Directory of the runs, which is made.", required=True)
    flags.DEFINE_integer("kills", 100, "How often a run is killed.")
    flags.DEFINE_integer("topologies", 20, "On how many other layouts a run goes on.")
    flags.DEFINE_bool("damages", True, "Whether runs are damaged, too.")
    flags.DEFINE_integer("seed", 0, "Of the moments, signals and places.")
    flags.DEFINE_string("json", None, "File to write the figures to.")

    def main() -> None:
        """Disturb, compare, print, write."""
        given = {name: flags.FLAGS[name].value for name in ("kills", "topologies", "damages", "seed")}
        if min(given["kills"], given["topologies"]) < 0:
            raise ConfigError(f"kills = {given['kills']}, topologies = {given['topologies']}: must not be negative")
        out = Path(flags.FLAGS.out).expanduser().absolute()
        out.mkdir(parents=True, exist_ok=True)
        out = Path(tempfile.mkdtemp(dir=out, prefix="chaos-"))
        jax.config.update("jax_platforms", "cpu")
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),  # so that a start need not compile again
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(out / "data"),
        }
        begin, rng = time.monotonic(), random.Random(given["seed"])
        straight = out / "undisturbed"
        to_end(straight)
        campaigns = {"topologies": lambda: moved(out, given["topologies"], rng)} if given["topologies"] else {}
        campaigns |= {"damages": lambda: damaged(out, straight, rng)} if given["damages"] else {}
        campaigns |= {"kills": lambda: killed(out, straight, given["kills"], rng)} if given["kills"] else {}
        found = {}
        for name, campaign in campaigns.items():
            found[name] = campaign()
            if flags.FLAGS.json:  # now, so that what comes next cannot take it away
                figures = {"versions": versions() | {"cores": os.cpu_count()}, "flags": given}
                figures |= {"seconds": round(time.monotonic() - begin)} | found
                Path(flags.FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")
        print(f"{table(found)}\nall as it should be, in {duration(time.monotonic() - begin)}")

    cli.launch(main)
