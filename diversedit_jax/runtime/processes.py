"""Several processes as one program: how they find each other, agree, stop together, and end when one of them fails.

On Cloud TPU, under SLURM and under Open MPI processes find each other by themselves. Elsewhere each is told:

    python -m diversedit_jax.train ... --coordinator=HOST:PORT --num_processes=2 --process_id=0

The coordinator is process 0; it has no authentication, so its port belongs into a private network.
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
from jax.experimental import multihost_utils

from diversedit_jax.errors import ConfigError, RunError

TIMEOUT = 300  # seconds until all processes have to be there
SEEN = 60  # seconds until a file that one process writes has to be seen by all


def define_flags() -> None:
    """The flags that `start` reads."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where processes do not find each other.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
    flags.DEFINE_integer("heartbeat", 100, "Seconds without a sign of life after which a process counts as dead.")


def start(given: Any) -> None:
    """Join the other processes, if there are any: by flags, else as the cluster says. ConfigError for flags at odds."""
    named = {name: given[name].value for name in ("coordinator", "num_processes", "process_id")}
    options: dict[str, Any] = {"heartbeat_timeout_seconds": given.heartbeat, "initialization_timeout": TIMEOUT}
    if any(value is not None for value in named.values()):
        missing = [name for name, value in named.items() if value is None]
        if missing:
            raise ConfigError(f"--coordinator, --num_processes and --process_id go together: give --{missing[0]} too")
        if not 0 <= named["process_id"] < named["num_processes"]:
            raise ConfigError(
                f"--process_id={named['process_id']}: wanted 0 .. {named['num_processes'] - 1} (--num_processes)"
            )
        where = f"{named['num_processes']} processes at {named['coordinator']}"
        options |= {"coordinator_address": named["coordinator"]}
        options |= {name: named[name] for name in ("num_processes", "process_id")}
    elif (where := cluster()) is None:
        return
    print(f"waiting for {where}, up to {TIMEOUT} s", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes did not find each other: {' '.join(str(error).split())[:300]}") from error


def cluster() -> str | None:
    """What this process is one of, in words, where jax finds the others by itself; None if it stands alone."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return f"{os.environ['SLURM_NTASKS']} SLURM tasks"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return f"{os.environ['OMPI_COMM_WORLD_SIZE']} Open MPI processes"
    if jax.config.jax_platforms in (None, "", "tpu") and importlib.util.find_spec("libtpu") and tpu_chips():
        return "all workers of the TPU"
    return None


def tpu_chips() -> bool:
    """Whether this host has TPU chips."""
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def agree(what: str, mine: Mapping[str, Any]) -> None:
    """Raise ConfigError, on every process, that names the first key in which a process differs from process 0."""
    if jax.process_count() == 1:
        return
    text = json.dumps(mine, sort_keys=True, default=str).encode()
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(int(max(sizes))), np.uint8)
    gathered = multihost_utils.process_allgather(padded)
    said = [json.loads(bytes(row)) for row in np.asarray(gathered, np.uint8)]
    for process, other in enumerate(said):
        for key in sorted(said[0].keys() | other.keys()):
            if said[0].get(key) != other.get(key):
                raise ConfigError(
                    f"{what}: {key} is {said[0].get(key)!r} on process 0 and {other.get(key)!r} on process {process}: "
                    "all processes need the same"
                )


def all_of(mine: bool) -> bool:
    """Whether this is so on every process."""
    if jax.process_count() == 1:
        return mine
    return bool(np.all(multihost_utils.process_allgather(np.int32(mine))))


def check_shared(directory: Path) -> None:
    """Raise ConfigError, on every process, if they do not see the same directory."""
    if jax.process_count() == 1:
        return
    number = np.frombuffer(uuid.uuid4().bytes, np.uint8)
    token = directory / f".seen-{bytes(multihost_utils.broadcast_one_to_all(number)).hex()}"
    if jax.process_index() == 0:
        token.touch()
    deadline = time.monotonic() + SEEN
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    everywhere = np.asarray(multihost_utils.process_allgather(np.int32(seen))).ravel()
    if jax.process_index() == 0:
        token.unlink(missing_ok=True)
    if not everywhere.all():
        blind = ", ".join(map(str, np.flatnonzero(everywhere == 0)))
        raise ConfigError(
            f"{directory} is not shared: process 0 wrote a file there that process {blind} did not see in {SEEN} s. "
            "Use a directory that all hosts mount"
        )


def leave(code: int) -> NoReturn:
    """End this process after an error, at once: what sys.exit waits for may never come.

    One of several processes would wait for the others, which end when it is gone; and threads of orbax wait for minutes
    for a directory that could not be made.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def first_alone(function: Callable[[], Any]) -> Any:
    """What a function gives on process 0, where alone it runs; None elsewhere. Where it fails, all processes fail."""
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
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
