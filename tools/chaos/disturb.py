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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diversedit_jax.errors import RunError
from diversedit_jax.training.checkpoint import Checkpoints, nested
from tools.chaos.config import STEPS
from tools.chaos.processes import AS_USER, Processes, alive

LEG = 3  # steps on each topology
DEVICES = 2  # where the layout is not the question


def check(holds: bool, what: str, run: Processes | None = None) -> None:
    """Raise RunError, with the last words of a run, if this does not hold."""
    if not holds:
        raise RunError(what + (f"; its last words:\n{run.out()[-3000:]}" if run else ""))


def training(workdir: Path, **options: Any) -> list[str]:
    """The command of a run; options: config keys, with __ for a dot."""
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in options.items()]
    return ["diversedit_jax.train", "--config=tools/chaos/config.py", f"--workdir={workdir}", *given]


def ended(run: Processes) -> list[int]:
    """The exit codes; RunError if a process does not end."""
    try:
        return run.wait()
    except subprocess.TimeoutExpired:
        raise RunError(f"the run hangs; its last words:\n{run.out()[-3000:]}") from None


def to_end(workdir: Path, count: int = 1, devices: int = DEVICES, **options: Any) -> str:
    """Train to the end; what process 0 said."""
    with Processes(training(workdir, **options), count, devices, workdir.parent) as run:
        codes = ended(run)
        check(codes == [0] * count, f"{workdir.name} ended with {codes}", run)
        return run.out()


def checkpoints(workdir: Path) -> Checkpoints:
    return Checkpoints(workdir / "checkpoints")


def record(workdir: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of its arrays."""
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())["body"]


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


def check_same(workdir: Path, straight: Path) -> None:
    """RunError, if a run did not end with the bits of the undisturbed one."""
    sums = [record(folder, STEPS)["checksums"] for folder in (workdir, straight)]
    check(sums[0] == sums[1], f"{workdir.name} ended with other arrays than the undisturbed run")
    check(losses(workdir) == losses(straight), f"{workdir.name} logged other losses than the undisturbed run")


def check_restores(workdir: Path) -> None:
    """RunError, if the newest checkpoint does not come back with the checksums of when it was saved."""
    found = checkpoints(workdir)
    if (step := found.latest()) is None:
        return
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = record(workdir, step)["leaves"].items()
    found.restore(nested({path: jax.ShapeDtypeStruct(*leaf, sharding=here) for path, leaf in leaves}), step)


# --- Kills.

MOMENTS = {"in a save": 5, "while it trains": 4, "while it starts": 1}  # and how often each


class Kill(NamedTuple):
    """moment and number: when, and by which signal. torn: whether a half-written checkpoint was left."""

    moment: str
    number: int
    workers: int
    code: int
    reached: int
    kept: int
    torn: bool


def came(run: Processes, there: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether something came before the run ended."""
    deadline = time.monotonic() + seconds
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
    """Return when this moment has come; False if the run ended before."""
    if moment == "while it starts":
        begin, wait = time.monotonic(), rng.uniform(0, 6)
        return came(run, lambda: time.monotonic() > begin + wait or "\nstep " in run.out())
    before = temporaries(workdir)
    if not came(run, lambda: "\nstep " in run.out()):
        return False
    time.sleep(rng.uniform(0, 1))
    if moment == "in a save":
        there = came(run, lambda: bool(temporaries(workdir) - before))
        time.sleep(rng.uniform(0, 0.2))
        return there
    return True


def life(workdir: Path, rng: random.Random, kill: bool) -> Kill | None:
    """One start of the run, which is killed; None if it came to its end."""
    moment = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    workers = rng.choice([0, 0, 0, 2])
    resumes = checkpoints(workdir).latest()
    with Processes(training(workdir, input__num_workers=workers), 1, DEVICES, workdir.parent) as run:
        (process,) = run.running
        there = kill and at_moment(run, workdir, moment, rng)
        complete = checkpoints(workdir).latest() or 0
        if there:
            process.send_signal(number)
        (code,) = ended(run)
        deadline = time.monotonic() + 5
        while alive(process.pid):
            check(time.monotonic() < deadline, "a process of the run was alive 5 s after it", run)
            time.sleep(0.05)
        out = run.out()
        if "\nstep " in out or out.startswith("step "):
            wanted = f"resuming from step {resumes} of" if resumes else "starting a new run"
            check(wanted in out, f"wanted: {wanted}", run)
        if code == 0:
            return None
        check(there and code in ([-number, 42] if number == signal.SIGTERM else [-number]), f"code {code}", run)
        reached, kept = max(step_of(out), resumes or 0), checkpoints(workdir).latest() or 0
        check(kept >= complete, f"step {complete} was complete, and {kept} is the newest now", run)
        check(code != 42 or kept >= reached, f"it stopped and saved {kept}, but had reached {reached}", run)
        check_restores(workdir)
        return Kill(moment, number, workers, code, reached, kept, bool(temporaries(workdir)))


def killed(out: Path, straight: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill runs so many times, and compare each that comes to its end."""
    done: list[Kill] = []
    finished = 0
    while len(done) < kills or not finished:
        workdir = out / f"killed_{finished}"
        while (one := life(workdir, rng, len(done) < kills)) is not None:
            done.append(one)
            name = signal.Signals(one.number).name
            left = ", a half-written checkpoint left" if one.torn else ""
            print(
                f"kill {len(done):>3}/{kills}  {name} {one.moment}, {one.workers} workers: code {one.code}, "
                f"at step {one.reached}, kept {one.kept}{left}",
                flush=True,
            )
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


# --- Topologies.


def layouts() -> list[tuple[int, int, int]]:
    """(data, fsdp, processes) on 8, 4, 2 and 1 devices."""
    meshes = [(devices // fsdp, fsdp) for devices in (8, 4, 2, 1) for fsdp in (1, 2, 4, 8) if fsdp <= devices]
    return [(*mesh, count) for mesh in meshes for count in (1, 2) if count <= mesh[0] * mesh[1]]


def moved(out: Path, topologies: int, rng: random.Random) -> dict[str, Any]:
    """Continue a run on so many layouts, and compare its losses with those of one that stayed on 8 x 1."""
    known = layouts()
    rng.shuffle(known)
    total = LEG * (topologies + 1)
    wide = {"model__width": 64, "checkpoint__every": LEG}  # so wide that fsdp splits parameters
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


# --- Damages.


class Damage(NamedTuple):
    """do: what happens to a run's directory before it starts. code, says: how the run must end, and what it must say.

    With code 0 it must end as the undisturbed run did. limit: the largest file, in bytes, from its first step on; after
    that it must end well without the limit. flags: more options of the run.
    """

    do: Callable[[Path], object]
    code: int = 0
    says: str = ""
    limit: int = 0
    flags: tuple[tuple[str, str], ...] = ()


def newest(workdir: Path) -> Path:
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
    """The last save is undone, so that the run has steps to do."""
    shutil.rmtree(newest(workdir))


def torn_metrics(workdir: Path) -> None:
    unfinished(workdir)
    file = workdir / "metrics.jsonl"
    os.truncate(file, file.stat().st_size - 700)  # within the line before the last


def read_only(workdir: Path, part: str) -> None:
    unfinished(workdir)
    (workdir / part).chmod(0o555)


def damages(out: Path, rng: random.Random) -> Iterator[tuple[str, Damage]]:
    """All damages, by what they are."""
    aside = "is set aside as"
    yield "largest file cut off", Damage(lambda workdir: cut(largest(newest(workdir))), says=aside)
    yield "largest file emptied", Damage(lambda workdir: os.truncate(largest(newest(workdir)), 0), says=aside)
    yield "largest file removed", Damage(lambda workdir: largest(newest(workdir)).unlink(), says=aside)
    yield "record removed", Damage(lambda workdir: (newest(workdir) / "meta" / "metadata").unlink(), says=aside)
    yield "record cut off", Damage(lambda workdir: cut(newest(workdir) / "meta" / "metadata"), says=aside)
    for number in range(4):

        def flip_one(workdir: Path) -> None:
            flip(rng.choice(sorted(path for path in newest(workdir).rglob("*") if path.is_file())), rng)

        yield f"bit flipped in any file, {number}", Damage(flip_one)
    yield "bit flipped in the data", Damage(lambda workdir: flip(largest(newest(workdir)), rng))
    yield "empty directory as a step", Damage(lambda workdir: (newest(workdir).parent / "999").mkdir(), says=aside)
    yield "every checkpoint cut off", Damage(cut_all, 74, "no whole checkpoint in")
    yield "config.json cut off", Damage(lambda workdir: cut(workdir / "config.json"), 78, "config.json is damaged")
    yield "metrics.jsonl torn", Damage(torn_metrics, says="resuming from step")
    yield "checkpoints read-only", Damage(lambda workdir: read_only(workdir, "checkpoints"), 74, "could not be written")
    yield "workdir read-only", Damage(lambda workdir: read_only(workdir, "."), 78, "cannot be written")
    yield "disk full at a save", Damage(unfinished, 74, "could not be written", limit=100_000)
    yield "disk full at a metric", Damage(unfinished, 74, "cannot write a file", limit=20_000)
    data = out / "damaged_data"
    shutil.copytree(out / "data" / "diversedit_jax", data)
    cut(next(data.rglob("*-train.array_record*")))
    flag = (("data__data_dir", str(data)),)
    yield "data cut off", Damage(unfinished, 65, "is damaged", flags=flag)


def damaged(out: Path, straight: Path, rng: random.Random) -> dict[str, Any]:
    """Start runs that are damaged; how many went on, and the exit code of each."""
    found: dict[str, int] = {}
    for number, (name, damage) in enumerate(damages(out, rng)):
        workdir = out / f"damaged_{number}"
        shutil.copytree(straight, workdir)
        damage.do(workdir)
        with Processes(training(workdir, **dict(damage.flags)), 1, DEVICES, out, before=AS_USER) as run:
            if damage.limit:
                check(came(run, lambda run=run: "\nstep " in run.out()), f"{name}: it ended early", run)
                resource.prlimit(run.running[0].pid, resource.RLIMIT_FSIZE, (damage.limit, resource.RLIM_INFINITY))
            (code,) = ended(run)
            check(code == damage.code, f"{name}: code {code}, wanted {damage.code}", run)
            check(damage.says in run.out(), f"{name}: it does not say '{damage.says}'", run)
            said = [line for line in run.out().splitlines() if line.startswith("error: ")]
            check(len(said) == (code != 0) and "Traceback" not in run.out(), f"{name}: more than one line", run)
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
        flat = {}
        for name, value in figures.items():
            flat |= {f"{name}: {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        lines += [f"  {name.replace('_', ' '):<46}{value:>10.3g}" for name, value in flat.items()]
    return "\n".join(lines)
