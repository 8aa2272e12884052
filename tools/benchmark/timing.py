"""What the benchmarks share: forms timed in turn, the machine that they ran on, and tables of what was found.

Rounds go through all forms in turn, so that what disturbs the machine disturbs them alike. A time is the median over
rounds; a ratio is the median of the ratios within each round, which is steadier than the ratio of medians. Beside both
stand the quartiles.
"""

import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diversedit_jax.runtime.versions import versions

Form = Callable[[], float]  # does its work once, and returns the seconds of what counts of it
Rows = Sequence[Mapping[str, Any]]


def say(line: str) -> None:
    """A line of progress."""
    print(f"  {line}", file=sys.stderr, flush=True)


def clocked(work: Callable[[], Any]) -> Form:
    """A form whose whole work counts."""

    def form() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return form


class Subject(NamedTuple):
    """What is timed: a form that does something `count` times, and what else is known of it."""

    form: Form
    count: int
    facts: dict[str, Any]


def counted(go: Callable[[int], float], count: int | None, at_least: float) -> tuple[Form, int]:
    """A form of `go`, which does something so many times: `count`, or as often as takes `at_least` seconds."""
    if count is None:
        go(1)
        count = max(1, math.ceil(at_least / go(1)))
    return partial(go, count), count


def measured(subjects: Mapping[str, Subject], rounds: int) -> list[dict[str, Any]]:
    """A row for each subject: its name, seconds `s` of what it does once, their `ratio` to the first's, its facts."""
    times = in_turn({name: one.form for name, one in subjects.items()}, rounds)
    each = {name: [value / one.count for value in times[name]] for name, one in subjects.items()}
    base = next(iter(each.values()))
    return [
        {"name": name, "s": spread(each[name]), "ratio": ratios(each[name], base), **one.facts}
        for name, one in subjects.items()
    ]


def in_turn(forms: Mapping[str, Form], rounds: int) -> dict[str, list[float]]:
    """The seconds of each form in each round, after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            seconds = form()
            if number:
                found[name].append(seconds)
        if number and sys.stderr.isatty():
            say(f"round {number} of {rounds}")
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles of some values; of fewer than four the extremes."""
    low, _, high = (
        statistics.quantiles(values, method="inclusive") if len(values) > 3 else (min(values), 0, max(values))
    )
    return {"median": statistics.median(values), "low": low, "high": high}


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios of what was timed in the same rounds."""
    return spread([value / of for value, of in zip(values, base, strict=True)])


# --- The machine.


def hardware() -> dict[str, Any]:
    """The processor, its cores, and how many programs ran in the last minute before this one."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    load = round(os.getloadavg()[0], 1)
    return {"processor": (names or [platform.machine()])[0], "cores": os.cpu_count(), "load": load}


def product_tflops(dtype: str) -> float:
    """TFLOP/s of one large product on one device, the best of several: what a network can be compared with here."""
    side = 1536 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(jnp.matmul)
    form = clocked(lambda: product(a, b).block_until_ready())
    return 2 * side**3 / min(form() for _ in range(8)) / 1e12


# --- What a person and a machine read.


def command() -> str:
    """The command that runs, as one types it, without what says where figures are written."""
    words = [shown(word) for word in sys.argv[1:] if not re.match(r"--?(json|out)\b", word)]
    path = Path(sys.argv[0]).with_suffix("").parts
    module = ".".join(path[path.index("tools") :]).removesuffix(".__main__")
    return " ".join([f"python -m {module}", *words])


def shown(word: str) -> str:
    """An argument as one types it."""
    return re.sub(r"^(--[\w.]+=)(.*[^\w.:,/=+-].*)$", r'\1"\2"', word)


def number(value: float | None, digits: int) -> str:
    """A figure for a table: nothing where there is none."""
    return "" if value is None else f"{value:,.{digits}f}"


def spread_of(found: Mapping[str, float], digits: int, factor: float = 1.0) -> str:
    """A median with its quartiles."""
    low, median, high = (f"{found[key] * factor:,.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, aligned for a terminal: the first column to the left, the others to the right.

    A column in which nothing stands is left out.
    """
    kept = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    rows = [[row[i] for i in kept] for row in (heads, *lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(kept))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return " | ".join([f"| {first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]) + " |"

    return "\n".join(line(row) for row in (rows[0], rule, *rows[1:]))


def about(found: Mapping[str, Any]) -> str:
    """The command, the commit and the machine of a record, in Markdown."""
    versions, machine = found["versions"], found["hardware"]
    device = (
        versions["devices"] if versions["backend"] != "cpu" else f"{machine['cores']} cores, {machine['processor']}"
    )
    commit = versions.get("git_commit", "unknown")
    return f"`{found['command']}`  \n{device}; jax {versions['jax']}; commit {commit}; load before {machine['load']}"


def write(path: Path, found: Mapping[str, Any], text: str) -> None:
    """A record as JSON, and beside it its table as Markdown."""
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(f"{about(found)}\n\n{text}\n", encoding="utf-8")


def record(kind: str, **figures: Any) -> dict[str, Any]:
    """Figures with the command and the machine that they are of."""
    return {"kind": kind, "command": command(), "versions": versions(), **figures}
