"""Shared parts of the benchmarks: forms timed in turn, the machine, tables and records.

A round runs every form once, so a disturbance of the machine hits all forms alike. A time is the median over rounds.
A ratio is the median of the ratios within each round, which is steadier than the ratio of medians. Both come with
their quartiles.
"""

import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Form = Callable[[], float]  # does its work and returns the seconds that count


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"  {line}", file=sys.stderr, flush=True)


def clocked(work: Callable[[], Any]) -> Form:
    """A form that counts all the time of `work`."""

    def form() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return form


class Subject(NamedTuple):
    """A form that does its work `count` times, and further facts for its row."""

    form: Form
    count: int
    facts: dict[str, Any]


def counted(go: Callable[[int], float], count: int | None, at_least: float = 0.5) -> tuple[Form, int]:
    """A form that calls go(count), and the count; None: as many as take `at_least` seconds."""
    if count is None:
        go(1)
        count = max(1, math.ceil(at_least / go(1)))
    return partial(go, count), count


def measured(subjects: Mapping[str, Subject], rounds: int) -> list[dict[str, Any]]:
    """A row for each subject: its name, seconds `s` of doing it once, their `ratio` to the first's, its facts."""
    times = in_turn({name: one.form for name, one in subjects.items()}, rounds)
    each = {name: [value / one.count for value in times[name]] for name, one in subjects.items()}
    base = next(iter(each.values()))
    return [
        {"name": name, "s": spread(each[name]), "ratio": ratios(each[name], base), **one.facts}
        for name, one in subjects.items()
    ]


def in_turn(forms: Mapping[str, Form], rounds: int) -> dict[str, list[float]]:
    """The seconds of each form in each round. A first round does not count."""
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
    """The median and the quartiles; the extremes of fewer than four values."""
    many = len(values) > 3
    low, _, high = statistics.quantiles(values, method="inclusive") if many else (min(values), 0, max(values))
    return {"median": statistics.median(values), "low": low, "high": high}


def ratios(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios within the rounds."""
    return spread([value / of for value, of in zip(values, base, strict=True)])


def hardware() -> dict[str, Any]:
    """The processor, its cores, and the load of the last minute."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    load = round(os.getloadavg()[0], 1)
    return {"processor": (names or [platform.machine()])[0], "cores": os.cpu_count(), "load": load}


def product_tflops(dtype: str) -> float:
    """TFLOP/s of one large matrix product on one device, the best of eight."""
    side = 1536 if jax.default_backend() == "cpu" else 8192
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.dtype(dtype)) for i in range(2))
    product = jax.jit(jnp.matmul)
    form = clocked(lambda: product(a, b).block_until_ready())
    return 2 * side**3 / min(form() for _ in range(8)) / 1e12


def command() -> str:
    """The running command as one types it, without its output file."""
    words = [shown(word) for word in sys.argv[1:] if not re.match(r"--?(json|out)\b", word)]
    path = Path(sys.argv[0]).with_suffix("").parts
    module = ".".join(path[path.index("tools") :]).removesuffix(".__main__")
    return " ".join([f"python -m {module}", *words])


def shown(word: str) -> str:
    """An argument as one types it."""
    return re.sub(r"^(--[\w.]+=)(.*[^\w.:,/=+-].*)$", r'\1"\2"', word)


def cell(value: float | Mapping[str, float] | None, digits: int, factor: float = 1.0) -> str:
    """A figure of a table, or a median with its quartiles; empty for None."""
    if isinstance(value, Mapping):
        low, median, high = (cell(value[key], digits, factor) for key in ("low", "median", "high"))
        return f"{median} ({low}-{high})"
    return "" if value is None else f"{value * factor:,.{digits}f}"


def table_of(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, tuple]) -> str:
    """A table of rows with a `name`. columns: (key of the row, digits, factor) by head."""
    lines = [[row["name"], *(cell(row.get(key), *form) for key, *form in columns.values())] for row in rows]
    return table(["", *columns], lines)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, also aligned for a terminal. Empty columns are left out."""
    kept = [i for i in range(len(heads)) if any(line[i] for line in lines)]
    rows = [[row[i] for i in kept] for row in (heads, *lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(kept))]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def about(found: Mapping[str, Any]) -> str:
    """The command, the commit and the machine of a record, in Markdown."""
    versions, machine = found["versions"], found["hardware"]
    on_cpu = versions["backend"] == "cpu"
    device = f"{machine['cores']} cores, {machine['processor']}" if on_cpu else versions["devices"]
    commit = versions.get("git_commit", "unknown")
    return f"`{found['command']}`  \n{device}; jax {versions['jax']}; commit {commit}; load before {machine['load']}"


def write(path: Path, found: Mapping[str, Any], text: str) -> None:
    """Write a record as JSON and its table as Markdown beside it."""
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(f"{about(found)}\n\n{text}\n", encoding="utf-8")
