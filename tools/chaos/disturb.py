"""Campaigns that disturb runs: kills, other topologies, damages."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diversedit_jax.errors import RunError
from diversedit_jax.training.checkpoint import Checkpoints, nested
from tools.chaos.config import STEPS
from tools.chaos.processes import AS_USER, Processes, alive

LEG = 3  # steps on each topology
DEVICES = 2  # of a run whose topology is not tested


def check(holds: bool, what: str, run: Processes | None = None) -> None:
    """Raise RunError, with the end of the run's output, if `holds` is False."""
    if not holds:
        raise RunError(what + (f"; its output ends with:\n{run.out()[-3000:]}" if run else ""))


def training(workdir: Path, **options: Any) -> list[str]:
    """The command of a run. options: config keys, with __ for a dot."""
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in options.items()]
    return ["diversedit_jax.train", "--config=tools/chaos/config.py", f"--workdir={workdir}", *given]


def ended(run: Processes) -> list[int]:
    """The exit codes; RunError if a process does not end."""
    try:
        return run.wait()
    except subprocess.TimeoutExpired:
        check(False, "the run hangs", run)


def to_end(workdir: Path, count: int = 1, devices: int = DEVICES, **options: Any) -> str:
    """Train to the end; returns the output of process 0."""
    with Processes(training(workdir, **options), count, devices, workdir.parent) as run:
        codes = ended(run)
        check(not any(codes), f"{workdir.name} ended with {codes}", run)
        return run.out()


def newest(workdir: Path) -> int | None:
    """The step of the newest complete checkpoint."""
    return Checkpoints(workdir / "checkpoints").latest()


def record(workdir: Path, step: int) -> dict[str, Any]:
    """A checkpoint's record of its arrays."""
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["body"]


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


def check_same(workdir: Path, straight: Path) -> None:
    """RunError if a run did not end with the bits of the undisturbed one."""
    found, wanted = (record(folder, STEPS)["checksums"] for folder in (workdir, straight))
    check(found == wanted, f"{workdir.name} ended with other arrays than the undisturbed run")
    check(losses(workdir) == losses(straight), f"{workdir.name} logged other losses than the undisturbed run")


def check_restores(workdir: Path) -> None:
    """RunError if the newest checkpoint does not restore with the checksums of its save."""
    if (step := newest(workdir)) is not None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        leaves = record(workdir, step)["leaves"].items()
        wanted = nested({path: jax.ShapeDtypeStruct(*leaf, sharding=here) for path, leaf in leaves})
        Checkpoints(workdir / "checkpoints").restore(wanted, step)


MOMENTS = {"in a save": 5, "while it trains": 4, "while it starts": 1}  # their weights


class Kill(NamedTuple):
    """A run that was killed."""

    moment: str
    number: int  # of the signal
    workers: int
    code: int
    reached: int  # last step
    kept: int  # step of the newest checkpoint
    torn: bool  # whether a half-written checkpoint was left


def came(run: Processes, there: Callable[[], bool]) -> bool:
    """Wait for `there`; False if the run ended before."""
    deadline = time.monotonic() + 60
    while not there():
        if run.running[0].poll() is not None:
            return False
        check(time.monotonic() < deadline, "the run hangs", run)
        time.sleep(0.003)
    return True


def temporaries(workdir: Path) -> set[str]:
    """The half-written checkpoints."""
    return {path.name for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")}


def step_of(out: str) -> int:
    """The last step that a run reported; 0 if none."""
    reports = [line for line in out.splitlines() if line.startswith("step ") and "/" in line]
    return int(reports[-1].split()[1].split("/")[0]) if reports else 0


def at_moment(run: Processes, workdir: Path, moment: str, rng: random.Random) -> bool:
    """Wait for a moment; False if the run ended before."""
    if moment == "while it starts":
        begin, wait = time.monotonic(), rng.uniform(0, 6)
        return came(run, lambda: time.monotonic() > begin + wait or "\nstep " in run.out())
    before = temporaries(workdir)
    if not came(run, lambda: "\nstep " in run.out()):
        return False
    time.sleep(rng.uniform(0, 1))
    if moment == "while it trains":
        return True
    there = came(run, lambda: bool(temporaries(workdir) - before))
    time.sleep(rng.uniform(0, 0.2))
    return there


def life(workdir: Path, rng: random.Random, kill: bool) -> Kill | None:
    """Start the run and kill it; None if it reached its end."""
    moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    workers = rng.choice([0, 0, 0, 2])
    resumes = newest(workdir)
    with Processes(training(workdir, input__num_workers=workers), 1, DEVICES, workdir.parent) as run:
        (process,) = run.running
        there = kill and at_moment(run, workdir, moment, rng)
        complete = newest(workdir) or 0
        if there:
            process.send_signal(number)
        (code,) = ended(run)
        deadline = time.monotonic() + 5
        while alive(process.pid):
            check(time.monotonic() < deadline, "a process of the run was alive 5 s after its end", run)
            time.sleep(0.05)
        out = run.out()
        if "\nstep " in out or out.startswith("step "):
            wanted = f"resuming from step {resumes} of" if resumes else "starting a new run"
            check(wanted in out, f"the output lacks {wanted!r}", run)
        if code == 0:
            return None
        check(there and (code == -number or (code, number) == (42, signal.SIGTERM)), f"code {code}", run)
        reached, kept = max(step_of(out), resumes or 0), newest(workdir) or 0
        check(kept >= complete, f"step {complete} was complete, but now {kept} is the newest", run)
        check(code != 42 or kept >= reached, f"it reached step {reached}, but stopped with {kept} saved", run)
        check_restores(workdir)
        return Kill(moment, number, workers, code, reached, kept, bool(temporaries(workdir)))


def killed(out: Path, straight: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill runs `kills` times, and compare each run that reaches its end."""
    done: list[Kill] = []
    finished = 0
    while len(done) < kills or not finished:
        workdir = out / f"killed_{finished}"
        while (one := life(workdir, rng, len(done) < kills)) is not None:
            done.append(one)
            how = f"{signal.Signals(one.number).name} {one.moment}, {one.workers} workers: code {one.code}"
            left = ", a half-written checkpoint left" if one.torn else ""
            print(f"kill {len(done):>3}/{kills}  {how}, at step {one.reached}, kept {one.kept}{left}", flush=True)
        check_same(workdir, straight)
        finished += 1
        print(f"run {finished}: arrays and losses equal those of the undisturbed run to the bit", flush=True)
    counts = Counter(f"{signal.Signals(one.number).name} {one.moment}" for one in done)
    return {
        "kills": len(done),
        "by_moment": dict(sorted(counts.items())),
        "with_workers": sum(one.workers > 0 for one in done),
        "half_written_left": sum(one.torn for one in done),
        "steps_done_again": sum(one.reached - one.kept for one in done),
        "runs_finished_and_equal": finished,
    }


def layouts() -> list[tuple[int, int, int]]:
    """(data, fsdp, processes) on 8, 4, 2 and 1 devices."""
    meshes = [(devices // fsdp, fsdp) for devices in (8, 4, 2, 1) for fsdp in (1, 2, 4, 8) if fsdp <= devices]
    return [(*mesh, count) for mesh in meshes for count in (1, 2) if count <= mesh[0] * mesh[1]]


def moved(out: Path, topologies: int, rng: random.Random) -> dict[str, Any]:
    """Continue a run on `topologies` layouts, and compare its losses with a run that stays on 8 x 1 devices."""
    known = layouts()
    rng.shuffle(known)
    total = LEG * (topologies + 1)
    wide = {"model__width": 64, "checkpoint__every": LEG}  # wide enough for fsdp to split parameters
    straight, workdir = out / "stayed", out / "moved"
    to_end(straight, devices=8, total_steps=total, **wide)
    to_end(workdir, devices=8, total_steps=LEG, **wide)
    for number, (data, fsdp, count) in enumerate(itertools.islice(itertools.cycle(known), topologies), 1):
        mesh = {"mesh__data": data, "mesh__fsdp": fsdp}
        said = to_end(workdir, count, data * fsdp // count, total_steps=LEG * (number + 1), **mesh, **wide)
        check(f"resuming from step {LEG * number} of" in said, f"it did not resume from step {LEG * number}: {said}")
        print(f"topology {number:>2}/{topologies}  {data} x {fsdp} devices, {count} processes", flush=True)
    found, wanted = losses(workdir), losses(straight)
    check(found.keys() == wanted.keys() == set(range(1, total + 1)), "losses of some steps are missing")
    difference = max(abs(found[step] / wanted[step] - 1) for step in wanted)
    check(difference < 1e-4, f"losses differ by {difference:.2g} relative")
    return {"restarts": topologies, "layouts": len(set(known[:topologies])), "largest_relative_difference": difference}


class Damage(NamedTuple):
    """A damage to a run, and how the run must end."""

    do: Callable[[Path], object]  # damages the run's directory before the start
    code: int = 0  # the exit code; with 0 the run must end with the bits of the undisturbed one
    says: str = ""  # a part of the output
    limit: int = 0  # bytes of a file that it may write after its first step; without the limit it must end well
    data: Path | None = None  # another data set


def last(workdir: Path) -> Path:
    return workdir / "checkpoints" / str(STEPS)


def largest(folder: Path) -> Path:
    """The largest file in a folder."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(file: Path) -> None:
    os.truncate(file, 100)


def cut_all(workdir: Path) -> None:
    for step in (workdir / "checkpoints").iterdir():
        cut(largest(step))


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def unfinished(workdir: Path) -> None:
    """Remove the last save, so that the run has steps to do."""
    shutil.rmtree(last(workdir))


def torn_metrics(workdir: Path) -> None:
    unfinished(workdir)
    file = workdir / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - 700)  # within the line before the last


def read_only(workdir: Path, part: str) -> None:
    unfinished(workdir)
    (workdir / part).chmod(0o555)


def damages(out: Path, rng: random.Random) -> dict[str, Damage]:
    """All damages by name."""

    def flip_any(workdir: Path) -> None:
        flip(rng.choice(sorted(path for path in last(workdir).rglob("*") if path.is_file())), rng)

    def meta(workdir: Path) -> Path:
        return last(workdir) / "meta" / "metadata"

    aside = "is set aside as"
    data = out / "damaged_data"
    shutil.copytree(out / "data" / "diversedit_jax", data)
    cut(next(data.rglob("*-train.array_record*")))
    return {
        "largest file cut off": Damage(lambda workdir: cut(largest(last(workdir))), says=aside),
        "largest file emptied": Damage(lambda workdir: os.truncate(largest(last(workdir)), 0), says=aside),
        "largest file removed": Damage(lambda workdir: largest(last(workdir)).unlink(), says=aside),
        "record removed": Damage(lambda workdir: meta(workdir).unlink(), says=aside),
        "record cut off": Damage(lambda workdir: cut(meta(workdir)), says=aside),
        **{f"bit flipped in any file, {number}": Damage(flip_any) for number in range(4)},
        "bit flipped in the data": Damage(lambda workdir: flip(largest(last(workdir)), rng)),
        "empty directory as a step": Damage(lambda workdir: (last(workdir).parent / "999").mkdir(), says=aside),
        "every checkpoint cut off": Damage(cut_all, 74, "no whole checkpoint in"),
        "config.json cut off": Damage(lambda workdir: cut(workdir / "config.json"), 78, "config.json is damaged"),
        "metrics.jsonl torn": Damage(torn_metrics, says="resuming from step"),
        "checkpoints read-only": Damage(lambda workdir: read_only(workdir, "checkpoints"), 74, "could not be written"),
        "workdir read-only": Damage(lambda workdir: read_only(workdir, "."), 78, "cannot be written"),
        "disk full at a save": Damage(unfinished, 74, "could not be written", limit=100_000),
        "disk full at a metric": Damage(unfinished, 74, "cannot write a file", limit=20_000),
        "data cut off": Damage(unfinished, 65, "is damaged", data=data),
    }


def damaged(out: Path, straight: Path, rng: random.Random) -> dict[str, Any]:
    """Start damaged runs; returns how many continued, and the exit code of each."""
    found: dict[str, int] = {}
    for number, (name, damage) in enumerate(damages(out, rng).items()):
        workdir = out / f"damaged_{number}"
        shutil.copytree(straight, workdir)
        damage.do(workdir)
        options = {"data__data_dir": damage.data} if damage.data else {}
        with Processes(training(workdir, **options), 1, DEVICES, out, before=AS_USER) as run:
            if damage.limit:
                check(came(run, lambda run=run: "\nstep " in run.out()), f"{name}: it ended early", run)
                resource.prlimit(run.running[0].pid, resource.RLIMIT_FSIZE, (damage.limit, resource.RLIM_INFINITY))
            (code,) = ended(run)
            check(code == damage.code, f"{name}: code {code}, wanted {damage.code}", run)
            check(damage.says in run.out(), f"{name}: the output lacks {damage.says!r}", run)
            said = [line for line in run.out().splitlines() if line.startswith("error: ")]
            check(len(said) == (code != 0) and "Traceback" not in run.out(), f"{name}: not one line of error", run)
        if damage.limit:
            to_end(workdir)
        if damage.limit or not code:
            check_same(workdir, straight)
        found[name] = code
        print(f"damage  {name}: code {code}{f'; {said[0][:100]}' if said else ', equal to the bit'}", flush=True)
        for path in (workdir, workdir / "checkpoints"):
            path.chmod(0o755)
    return {"runs": len(found), "went_on": sum(code == 0 for code in found.values()), "codes": found}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures, a line each."""
    lines = []
    for campaign, figures in found.items():
        lines.append(campaign)
        for name, value in figures.items():
            parts = {f"{name}: {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
            lines += [f"  {part.replace('_', ' '):<46}{number:>10.3g}" for part, number in parts.items()]
    return "\n".join(lines)
