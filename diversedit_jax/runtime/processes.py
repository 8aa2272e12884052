"""Several processes as one program: how they find each other, agree, and end when one of them fails.

On Cloud TPU, under SLURM and under Open MPI processes find each other by themselves. Elsewhere each gets flags:

    python -m diversedit_jax.train ... --coordinator=HOST:PORT --num_processes=2 --process_id=0

The coordinator is process 0. It has no authentication: keep its port inside a private network.
"""

import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.registry import in_range
from diversedit_jax.runtime.progress import say

TIMEOUT = 300  # seconds to wait for all processes
SEEN = 60  # seconds to wait until all processes see a file that one of them writes
FLAGS = ("coordinator", "num_processes", "process_id")
NAMES = (*FLAGS, "heartbeat")  # of all flags here


def define_flags() -> None:
    """The flags that `start` reads."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where processes do not find each other.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0, with --coordinator.")
    flags.DEFINE_integer("heartbeat", 100, "Seconds without a sign of life after which a process counts as dead.")


def start(given: Any) -> None:
    """Join the other processes, if there are any: those of the flags, else those of the cluster."""
    named = {name: given[name].value for name in FLAGS if given[name].value is not None}
    if named:
        for missing in [name for name in FLAGS if name not in named]:
            raise ConfigError(f"--coordinator, --num_processes and --process_id go together: give --{missing} too")
        in_range("--process_id", named["process_id"], 0, named["num_processes"] - 1)
        where = f"{named['num_processes']} processes at {named['coordinator']}"
        named["coordinator_address"] = named.pop("coordinator")
    elif (where := cluster()) is None:
        return
    say(f"waiting for {where}, up to {TIMEOUT} s")
    try:
        jax.distributed.initialize(**named, heartbeat_timeout_seconds=given.heartbeat, initialization_timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes did not find each other: {' '.join(str(error).split())[:300]}") from error


def cluster() -> str | None:
    """The processes that jax finds by itself, in words; None if this process is alone."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return f"{os.environ['SLURM_NTASKS']} SLURM tasks"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return f"{os.environ['OMPI_COMM_WORLD_SIZE']} Open MPI processes"
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if jax.config.jax_platforms in (None, "", "tpu") and importlib.util.find_spec("libtpu") and chips:
        return "all workers of the TPU"
    return None


def agree(what: str, mine: Mapping[str, Any]) -> None:
    """Raise ConfigError on every process if one has another value than process 0. It names the first such key."""
    if jax.process_count() == 1:
        return
    text = json.dumps(mine, sort_keys=True, default=str).encode()
    longest = int(max(process_allgather(np.int32(len(text)))))
    gathered = process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    first, *others = (json.loads(bytes(row)) for row in np.asarray(gathered, np.uint8))
    for process, other in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ConfigError(
                    f"{what}: {key} is {first.get(key)!r} on process 0 and {other.get(key)!r} on process {process}: "
                    "all processes need the same"
                )


def all_of(mine: bool) -> bool:
    """Whether this is true on every process."""
    return mine if jax.process_count() == 1 else bool(np.all(process_allgather(np.int32(mine))))


def check_shared(directory: Path) -> None:
    """Raise ConfigError, on every process, if they do not see the same directory."""
    if jax.process_count() == 1:
        return
    name = broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8))
    token = directory / f".seen-{bytes(name).hex()}"
    if jax.process_index() == 0:
        token.touch()
    deadline = time.monotonic() + SEEN
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    everywhere = np.asarray(process_allgather(np.int32(seen))).ravel()
    if jax.process_index() == 0:
        token.unlink(missing_ok=True)
    if not everywhere.all():
        blind = ", ".join(map(str, np.flatnonzero(everywhere == 0)))
        raise ConfigError(
            f"{directory} is not shared: process 0 wrote a file there that process {blind} did not see in {SEEN} s. "
            "Use a directory that all hosts mount"
        )


def leave(code: int) -> NoReturn:
    """End this process at once, after an error: sys.exit could wait for other processes, or for threads of orbax."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_alone(function: Callable[[], Any]) -> Any:
    """Call a function on process 0 alone, and return its result there; None elsewhere. If it fails, all fail."""
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except RunError as raised:
            error = raised
    if not all_of(error is None):
        raise error or ConfigError("process 0 refused; its message says why")
    return result


def number_of_first(number: int) -> int:
    """The number that process 0 has, on every process."""
    return number if jax.process_count() == 1 else int(broadcast_one_to_all(np.int32(number)))
