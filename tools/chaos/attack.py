"""A campaign against what surrounds a run: its output, its paths, permissions, settings, data and rivals."""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.data import digits
from diversedit_jax.training.checkpoint import Checkpoints
from tools.chaos.config import STEPS
from tools.chaos.disturb import (
    DEVICES,
    at_moment,
    came,
    check,
    check_restores,
    check_same,
    ended,
    losses,
    newest,
    step_of,
    to_end,
    training,
)
from tools.chaos.processes import AS_USER, IN_ORDER, ROOT, Processes

LEGAL = ["with blanks", "a]b", "ü{x}", "'quoted' \"twice\"", "$HOME", "m%20n#1", "-x,~|", "a:b", "new\nline", "x" * 200]
MISREAD = ["a[1]", "a*", "a?", "back\\slash", "gs:"]
NOTICE = 30  # seconds between the notice and the end of a preempted machine


def one_error(run: Processes, code: int, says: str) -> None:
    """RunError if a run does not end with this code and one line of error that holds `says`."""
    (found,) = ended(run)
    said = [line for line in run.out().splitlines() if line.startswith("error: ")]
    fits = found == code and len(said) == 1 and says in said[0] and "Traceback" not in run.out()
    check(fits, f"code {found}, wanted {code} and one line with {says!r}", run)


def stopped(run: Processes, workdir: Path) -> None:
    """RunError if a run does not stop within the notice, or has not saved its last step."""
    begin = time.monotonic()
    run.running[0].send_signal(signal.SIGTERM)
    (code,) = ended(run)
    seconds, reached = time.monotonic() - begin, step_of(run.out())
    over = reached == STEPS and code == -signal.SIGTERM  # it had done all, and closed its files
    check(code in (0, 42) or over, f"code {code}", run)
    check(seconds < NOTICE, f"it saved after {seconds:.0f} s", run)
    check((newest(workdir) or 0) >= reached, f"it reached step {reached}, but saved step {newest(workdir)}", run)


def trained(workdir: Path, rng: random.Random) -> None:
    """Let a run train for a while."""
    with Processes(training(workdir), 1, DEVICES, workdir.parent) as run:
        if at_moment(run, workdir, "while it trains", rng):
            stopped(run, workdir)
        else:
            ended(run)


def names(workdir: Path) -> set[str]:
    return {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.name != ".lock"}


@contextlib.contextmanager
def unchanged(workdir: Path) -> Iterator[None]:
    """RunError if files of a run come or go."""
    before = names(workdir)
    yield
    check(names(workdir) == before, f"files of {workdir.name} changed: {sorted(names(workdir) ^ before)[:5]}")


def closed_pipe(workdir: Path, rng: random.Random) -> None:
    """The reader of the output ends; then the run is stopped, as by Ctrl-C in `... 2>&1 | tee log`."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {IN_ORDER}".strip()
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES), "XLA_FLAGS": flags}
    command = [sys.executable, "-m", *training(workdir)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    with process:
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.stdout.close()
        time.sleep(rng.uniform(0, 1))
        process.send_signal(rng.choice([signal.SIGINT, signal.SIGTERM]))
        code = process.wait(timeout=60)
    check(code in (0, 42), f"code {code} after its pipe was closed")
    reached = max(losses(workdir))
    check(newest(workdir) >= reached, f"its pipe was closed: it reached step {reached}, but saved {newest(workdir)}")


def permission(workdir: Path, rng: random.Random) -> None:
    """A file or folder of the run cannot be opened for a while."""
    step = f"checkpoints/{newest(workdir)}"
    places = ["config.json", "metrics.jsonl", "checkpoints", step, f"{step}/meta/metadata", f"{step}/state"]
    place = workdir / rng.choice(places)
    mode = place.stat().st_mode
    place.chmod(0)
    try:
        with Processes(training(workdir), 1, DEVICES, workdir.parent, before=AS_USER) as run:
            one_error(run, 74, "Permission denied")
    finally:
        place.chmod(mode)


def special_path(workdir: Path, rng: random.Random) -> None:
    """The run goes on in a folder with an uncommon name; one that would be misread is refused."""
    name = rng.choice(LEGAL + MISREAD)
    home = workdir.parent / f"paths_{time.monotonic_ns()}" / name
    home.mkdir(parents=True)
    moved = workdir.rename(home / "run")
    with Processes(training(moved), 1, DEVICES, workdir.parent) as run:
        if name in MISREAD:
            one_error(run, 78, "orbax misreads")
        elif at_moment(run, moved, "while it trains", rng):
            stopped(run, moved)
        else:
            ended(run)
    moved.rename(workdir)


def other_keep(workdir: Path, rng: random.Random) -> None:
    """The run is told to keep more or fewer checkpoints, and is killed."""
    keep, every = rng.randint(1, 4), rng.choice([0, 8, 20])
    surplus = Checkpoints(workdir / "checkpoints", keep=keep, keep_every=every).surplus()
    with Processes(
        training(workdir, checkpoint__keep=keep, checkpoint__keep_every=every), 1, DEVICES, workdir.parent
    ) as run:
        if at_moment(run, workdir, "in a save", rng):
            run.running[0].kill()
        ended(run)
        said = f"the next save removes {', '.join(map(str, surplus))}" in run.out()
        check(said or not surplus, f"it does not say that it removes {surplus}", run)


def in_evaluation(workdir: Path, rng: random.Random) -> None:
    """The run is stopped while it computes scores from many samples."""
    scores = {"evaluators__digits__every": 4, "evaluators__digits__num": 20_000}
    with Processes(training(workdir, **scores), 1, DEVICES, workdir.parent) as run:
        if came(run, lambda: step_of(run.out()) % 4 == 0 and step_of(run.out()) > 0):
            time.sleep(rng.uniform(0, 1))
            stopped(run, workdir)
        else:
            ended(run)


class Shifted(digits.Digits, skip_registration=True):
    """The digits with the labels of their neighbours."""

    name = "digits"

    def _generate_examples(self, source, rows):
        for row, example in super()._generate_examples(source, rows):
            yield row, example | {"label": np.int32((example["label"] + 1) % digits.NUM_CLASSES)}


def other_data(workdir: Path, rng: random.Random) -> None:
    """The data are replaced between two starts."""
    place = workdir.parent / "other_data"
    if not place.exists():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # tfds draws bars
            Shifted(data_dir=place, file_format="array_record").download_and_prepare()
    with Processes(training(workdir, data__data_dir=place), 1, DEVICES, workdir.parent) as run:
        one_error(run, 78, "data.condition")


def rivals(workdir: Path, rng: random.Random) -> None:
    """Several starts at once: one trains, the others are refused."""
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(Processes(training(workdir), 1, DEVICES, workdir.parent)) for _ in range(3)]
        deadline = time.monotonic() + 120
        while sum(run.running[0].poll() is None for run in runs) > 1:
            check(time.monotonic() < deadline, "two runs are in one workdir", runs[0])
            time.sleep(0.05)
        codes = [run.running[0].poll() for run in runs]
        check(codes.count(78) == 2, f"of three starts ended {codes}", runs[0])
        (winner,) = (run for run, code in zip(runs, codes, strict=True) if code != 78)
        if at_moment(winner, workdir, "while it trains", rng):
            stopped(winner, workdir)
        check(ended(winner)[0] in (0, 42), "the run that went on failed", winner)


# Each with whether the run must stay as it is.
ATTACKS: dict[Callable[[Path, random.Random], None], bool] = {
    closed_pipe: False,
    permission: True,
    special_path: False,
    other_keep: False,
    in_evaluation: False,
    other_data: True,
    rivals: False,
}


def attacked(out: Path, straight: Path, draws: int, rng: random.Random) -> dict[str, Any]:
    """Attack runs `draws` times, and compare each run that reaches its end."""
    counts: Counter[str] = Counter()
    finished, workdir = 0, out / "attacked_0"
    for number in range(1, draws + 1):
        if newest(workdir) is None:
            trained(workdir, rng)
        attack = rng.choice(list(ATTACKS))
        before = newest(workdir)
        with unchanged(workdir) if ATTACKS[attack] else contextlib.nullcontext():
            attack(workdir, rng)
        check(newest(workdir) >= before, f"step {before} was complete, but now {newest(workdir)} is the newest")
        check_restores(workdir)
        counts[attack.__name__.replace("_", " ")] += 1
        print(f"attack {number:>3}/{draws}  {attack.__name__.replace('_', ' ')}: kept {newest(workdir)}", flush=True)
        if (workdir / "samples.png").exists() or number == draws:
            to_end(workdir)
            check_same(workdir, straight)
            finished += 1
            workdir = out / f"attacked_{finished}"
            print(f"run {finished}: arrays and losses equal those of the undisturbed run to the bit", flush=True)
    return {"attacks": draws, "by_kind": dict(sorted(counts.items())), "runs_finished_and_equal": finished}
