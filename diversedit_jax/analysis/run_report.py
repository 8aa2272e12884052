"""Draw what a training run wrote: curves.png, and report.html, a page with samples, curves, scores and config."""

import html
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from ml_collections import ConfigDict
from PIL import Image

from diversedit_jax import registry
from diversedit_jax.analysis import drawing, html_page, known_scores
from diversedit_jax.config import LABELED, PATHS, SINGLE, plain
from diversedit_jax.evaluation.tables import number
from diversedit_jax.reading import parse_json, read_json
from diversedit_jax.runs import check
from diversedit_jax.runtime.files import flat, replacing
from diversedit_jax.runtime.progress import brief

CURVES, REPORT = "curves.png", "report.html"
COLUMNS, HEIGHT = 3, 1.35  # panels in a row; inches of a panel with its title
SHARED = ("images_per_sec", "tflops_per_device", "mfu")  # in proportion to steps_per_sec, which is drawn
EXACT = ("learning_rate", "skipped_batches", "data/")  # they have no noise
TITLES = {"steps_per_sec": "speed (steps/s)", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
MANY = 60  # points; so many and more are smoothed over a WINDOW-th of them
WINDOW = 30
ROUND = (1, 2, 5, 10)  # the steps between ticks begin with these
SPAN = 30.0  # from this ratio of the largest to the smallest value on, an axis is logarithmic
SMALL, LARGE = 150, 700  # pixels of the page: widths of a grid of samples, of the last one
PROGRAMS = {"sample": "draw samples", "evaluate": "compute scores", "analyze": "look into the network"}
WIDEST = 34  # characters of a panel's title
LONGEST = 30  # characters of an option that the line about the run shows


class Curve(NamedTuple):
    """A metric of a run. values: NaN or infinite where the run wrote so."""

    steps: np.ndarray
    values: np.ndarray


class Facts(NamedTuple):
    """What the trainer knows of a run.

    step:    that it has reached.
    command: starts it again; None if not known.
    kind:    what its examples are, in a word.
    """

    config: ConfigDict
    step: int
    parameters: int
    command: str | None
    kind: str


def write(workdir: Path, facts: Facts) -> None:
    """Write the curves and the report of a run to its workdir, from what lies there."""
    curves = read(workdir / "metrics.jsonl")
    judges = tuple(f"{label}/" for label in facts.config.evaluators)
    drawn = chosen(curves, judges)
    image = draw(drawn, curves, judges)
    with replacing(workdir / CURVES) as partial:
        partial.write_bytes(image)
    about = html_page.listed(overview(facts, curves, read_json(workdir / "versions.json")))
    sections = {
        "Samples": samples(workdir / "samples"),
        "Curves": curves_section(image, drawn),
        "Scores": scores_section(curves, judges, facts.config),
        "Commands": commands_section(workdir, facts.command),
        "Config": config_section(facts.config),
        "Versions": html_page.listed(read_json(workdir / "versions.json")),
    }
    sections = {title: body for title, body in sections.items() if body}
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in sections)
    parts = [f"<section id='{title.lower()}'><h2>{title}</h2>{body}</section>" for title, body in sections.items()]
    page = [f"<p>{described(facts)}</p>", about, f"<nav>{links}</nav>", *parts]
    html_page.write_page(workdir / REPORT, workdir.name, page)


# What the run wrote.


def read(path: Path) -> dict[str, Curve]:
    """Read the metrics of a run: name -> curve, in the order in which they first appear."""
    points: dict[str, dict[int, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = parse_json(line)
        for name, value in record.items():
            if name not in ("step", "time"):
                points.setdefault(name, {})[record["step"]] = float(value)
    return {name: Curve(np.array(list(found)), np.array(list(found.values()))) for name, found in points.items()}


def chosen(curves: Mapping[str, Curve], judges: tuple[str, ...]) -> list[str]:
    """Choose the metrics to draw: losses, the parts of losses, what the optimizer does, speed, scores.

    A score that does not change, or is the spread or the limit of another one, is in the table only.
    """

    def place(name: str) -> int:
        if name.startswith(judges):
            return 5
        order = ("loss/total", "loss/objective", "loss/")
        rank = next((i for i, begin in enumerate(order) if name.startswith(begin)), None)
        return rank if rank is not None else 3 if "/" in name and not name.startswith("learning_rate") else 4

    names = [name for name in curves if name not in SHARED and not known_scores.is_about(name)]
    return sorted((name for name in names if place(name) < 5 or len(set(curves[name].values)) > 1), key=place)


def limit(name: str, curves: Mapping[str, Curve]) -> Curve | None:
    """The score of perfect samples or of real data, LABEL/NAME_floor or LABEL/real/NAME, if it is known."""
    label, _, score = name.partition("/")
    return curves.get(f"{name}_floor", curves.get(f"{label}/real/{score}"))


# Curves.


def draw(names: Sequence[str], curves: Mapping[str, Curve], judges: tuple[str, ...]) -> bytes:
    """Draw a panel for each of these metrics. Returns a PNG."""
    rows = max(1, math.ceil(len(names) / COLUMNS))
    last = max((int(curves[name].steps[-1]) for name in names), default=1)
    with matplotlib.rc_context(drawing.STYLE | {"figure.constrained_layout.use": False}), io.BytesIO() as file:
        height = HEIGHT * rows + 0.35
        figure = Figure((drawing.WIDTH, height))
        figure.subplots_adjust(0.07, 0.4 / height, 0.985, 1 - 0.2 / height, wspace=0.33, hspace=0.5)
        grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        for number, (axes, name) in enumerate(zip(grid, names, strict=False)):
            panel(axes, name, curves[name], name.startswith(judges), limit(name, curves))
            axes.set_xlim(0, last * 1.02)
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND, integer=True))
            axes.xaxis.set_major_formatter(drawing.thousands)
            if number + COLUMNS >= len(names):
                axes.set_xlabel("step")
        figure.savefig(file, format="png", dpi=drawing.DPI)
        return file.getvalue()


def panel(axes: Axes, name: str, curve: Curve, score: bool, floor: Curve | None) -> None:
    """Draw one metric. score: with a mark at each value. floor: of perfect samples, a dashed line."""
    fine = np.isfinite(curve.values)
    lost = int((~fine).sum())
    steps, values = curve.steps[fine], curve.values[fine]
    colour = drawing.COLOURS[1] if score else drawing.COLOURS[0]
    smooth = not score and not name.startswith(EXACT) and len(values) >= MANY
    axes.plot(steps, values, color=colour, linewidth=0.5 if smooth else 1.2, alpha=0.35 if smooth else 1)
    if smooth:
        axes.plot(steps, smoothed(values, max(3, len(values) // WINDOW)), color=colour)
    elif score or len(values) < 10:
        axes.plot(steps, values, "o", color=colour)
    if floor is not None and np.isfinite(floor.values[-1]):
        axes.axhline(floor.values[-1], color="#555", linestyle="--", linewidth=0.8)
    title = TITLES.get(name, name) + (f" (not finite: {lost})" if lost else "")
    title = title if len(title) <= WIDEST else f"{title[: WIDEST // 2]}…{title[1 - WIDEST // 2 :]}"
    axes.set_title(title, loc="left", parse_math=False)  # two $ in a name would begin and end a formula
    axes.grid(alpha=0.25, linewidth=0.5)
    if name == "steps_per_sec":
        axes.set_ylim(bottom=0)
    wide = len(values) and values.min() > 0 and values.max() >= SPAN * values.min()
    if wide and not name.startswith("learning_rate"):  # its decay to almost 0 is best seen on a linear axis
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="y", which="minor", length=1.5)
    elif len(values) and values.min() == values.max():
        axes.set_yticks([values[0]])
        axes.yaxis.set_major_formatter(drawing.thousands)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND))
        axes.yaxis.set_major_formatter(drawing.thousands)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` neighbours; of fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


# The page.


def described(facts: Facts) -> str:
    """A line that says what was trained: the parts of the run, with the options that are not their defaults."""
    config, marked = facts.config, changed(facts.config)

    def part(place: str, slot: ConfigDict) -> str:
        given = {key: slot.get(key) for key in slot if f"{place}.{key}" in marked and key not in PATHS}
        said = [text for key, value in given.items() if len(text := f"{key} {shown(value)}") <= LONGEST]
        return f"<strong>{html.escape(slot.name)}</strong>" + (f" ({html.escape(', '.join(said))})" if said else "")

    model, data = part("model", config.model), part("data", config.data)
    terms = [part("objective", config.objective)]
    terms += [part(f"losses.{label}", slot) for label, slot in config.losses.items()]
    length = f"{config.total_steps:,} steps of {config.batch_size:,} {facts.kind}"
    return f"{model} with {facts.parameters:,} parameters on {data}, trained by {' + '.join(terms)} for {length}."


def overview(facts: Facts, curves: Mapping[str, Curve], versions: Mapping[str, str]) -> dict[str, str]:
    """The main numbers of a run."""
    config, speed = facts.config, curves.get("steps_per_sec")
    found = {
        "steps done": f"{facts.step:,} of {config.total_steps:,}",
        "devices": f"{versions['devices']} ({versions['backend']})",
    }
    if speed is not None:
        rate = float(np.median(speed.values))
        found["speed"] = f"{brief(rate)} steps/s, {brief(rate * config.batch_size)} {facts.kind}/s (median)"
    if (work := curves.get("mfu")) is not None:
        found["MFU"] = f"{100 * float(np.median(work.values)):.0f}% (median)"
    return found


def changed(config: ConfigDict) -> set[str]:
    """The keys, without `config.`, whose values are not the defaults of their part, such as model.depth."""
    found = set()
    for part in check.parts_of(config, (*SINGLE, *LABELED)):
        place, given = part.place.removeprefix("config."), part.given.to_dict()
        defaults = registry.options(part.build) if part.build is not None else {}
        found |= {f"{place}.{k}" for k, one in defaults.items() if k in given and plain(given[k]) != plain(one.default)}
    return found


def shown(value: Any) -> str:
    """A value of the config as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def samples(folder: Path) -> str:
    """Show the grids of samples at some steps in order, small, and the last one large. Grids of videos move."""
    grids = sorted((path for path in folder.glob("*.png") if path.stem.isdigit()), key=lambda path: int(path.stem))
    few = [moving if (moving := path.with_suffix(".gif")).exists() else path for path in drawing.spaced(grids, 7)]
    shown = [figure(path, LARGE if path is few[-1] else SMALL) for path in few]
    return f'<div class="row">{"".join(shown)}</div>' if shown else ""


def figure(path: Path, width: int) -> str:
    """Show a grid of samples with its step below. Twice the width in pixels is enough for any screen.

    Of a small grid that moves and has more pixels, it is the first frame.
    """
    with Image.open(path, formats=("PNG", "GIF")) as image:
        wide, kind, content = image.width, path.suffix[1:], path.read_bytes()
        if wide > 2 * width and (kind == "png" or width == SMALL):
            with io.BytesIO() as file:
                image.convert("RGB").resize((2 * width, round(image.height * 2 * width / wide))).save(
                    file, format="jpeg", quality=88
                )
                kind, content = "jpeg", file.getvalue()
    step = f"step {int(path.stem):,}"
    shown = html_page.picture(content, f"samples at {step}", min(width, wide), kind)
    return f"<figure>{shown}<figcaption>{step}</figcaption></figure>"


def curves_section(image: bytes, names: Sequence[str]) -> str:
    """Show the curves, and how to read them."""
    if not names:
        return ""
    text = "Pale: every value written; strong: their mean over neighbours. Orange: scores of samples, where a dashed "
    text += "line is the score of real data. An axis is logarithmic where values span more than a factor of 30."
    width = round(drawing.WIDTH * html_page.PIXELS_PER_INCH)
    return f'<p>{text}</p><div class="wide">{html_page.picture(image, "curves of all metrics", width)}</div>'


def scores_section(curves: Mapping[str, Curve], judges: tuple[str, ...], config: ConfigDict) -> str:
    """A table of the last value of each score, and of the best one with its step."""
    rows = [["score", "last", "at step", "best", "at step"]]
    for name, (steps, values) in curves.items():
        if not name.startswith(judges) or known_scores.is_about(name):
            continue
        spread, lower = curves.get(f"{name}_std"), known_scores.lower_is_better(name)
        if config.checkpoint.best and name == config.checkpoint.metric:
            lower = config.checkpoint.lower
        last = number(values[-1]) + (f" ± {number(spread.values[-1])}" if spread is not None else "")
        best = ["", ""]
        if lower is not None and np.isfinite(values).any():
            finite = np.where(np.isfinite(values), values, np.nan)
            place = np.nanargmin(finite) if lower else np.nanargmax(finite)
            best = [number(values[place]), f"{steps[place]:,}"]
        rows.append([f"{name}{'' if lower is None else ' ↓' if lower else ' ↑'}", last, f"{steps[-1]:,}", *best])
    note = "<p>↓: lower is better. ↑: higher is better.</p>"
    return html_page.table(rows) + note if len(rows) > 1 else ""


def commands_section(workdir: Path, command: str | None) -> str:
    """The commands that go on with the run."""
    place = shlex.quote(str(workdir))
    lines = {"train on, after a stop or with more steps": command or f"train.run(config, {str(workdir)!r})"}
    for program, what in PROGRAMS.items():
        lines[what] = f"python -m diversedit_jax.{program} --workdir={place}"
    lines["watch in TensorBoard"] = f"tensorboard --logdir {place}"
    return f"<pre>{html.escape(chr(10).join(f'# {what}{chr(10)}{line}' for what, line in lines.items()))}</pre>"


def config_section(config: ConfigDict) -> str:
    """All values of the config, folded. Those that are not the defaults of their part are marked."""
    marked, values = changed(config), flat(config.to_dict())
    rows = "".join(
        f"<tr{' class=changed' if key in marked else ''}><td>{html.escape(key)}</td>"
        f"<td>{html.escape(shown(value))}</td></tr>"
        for key, value in sorted(values.items())
    )
    about = f"{len(values)} values. Bold: not the default of the option."
    return f'<details><summary>{about}</summary><table class="words">{rows}</table></details>'
