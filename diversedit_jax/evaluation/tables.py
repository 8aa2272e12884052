"""Scores and samples for people: a table, a CSV, a plot of a sweep, a grid of classes."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.runtime import files

Point = Mapping[str, Any]  # the options that a sweep varies
Row = tuple[Point, Mapping[str, float]]  # a point of a sweep, and its scores
AXES = {"cfg_scale": "guidance scale"}
TITLES = {"fid": "FID", "fd": "Fréchet distance", "inception_score": "Inception score", "clip_score": "CLIP score"}


def shortened(value: Any) -> str:
    """An option's value, fit for a file name: (0.0, 0.7) as 0-0.7."""
    if isinstance(value, tuple | list):
        return "-".join(map(shortened, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(varied: Point) -> str:
    """The varied options of a point of a sweep, fit for a folder name."""
    return ",".join(f"{name}={shortened(value)}" for name, value in varied.items())


def table(rows: Sequence[Row]) -> str:
    """Scores for a terminal: a line for each score, or for a sweep a line for each point without the float16 scores."""
    names = [name for name in rows[0][1] if "_std" not in name]
    if len(rows) == 1:
        (_, scores), width = rows[0], max(map(len, names), default=0)
        spreads = {name: f" ± {number(scores[f'{name}_std'])}" for name in names if f"{name}_std" in scores}
        return "\n".join(f"  {name:<{width}}  {number(scores[name])}{spreads.get(name, '')}" for name in names)
    names = [name for name in names if "float16" not in name]
    cells = [[*map(str, rows[0][0]), *names]]
    cells += [[*map(shortened, varied.values()), *(number(scores[name]) for name in names)] for varied, scores in rows]
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]], left: int = 0) -> str:
    """Rows of text as columns for a terminal. The first `left` columns are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    forms = [f"{{:{'<' if i < left else '>'}{width}}}" for i, width in enumerate(widths)]
    return "\n".join("  " + "  ".join(map(str.format, forms, row)) for row in cells)


def number(value: float) -> str:
    """A score as text: below 1 four decimals, below 100 four significant digits, above two decimals."""
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line for each point, with all digits."""
    lines = [[*map(shortened, varied.values()), *scores.values()] for varied, scores in rows]
    files.write_csv(path, [[*rows[0][0], *rows[0][1]], *lines])


def plot_sweep(path: Path, rows: Sequence[Row], title: str) -> None:
    """Plot distances, inception and CLIP scores over the first numeric option that varies, or the points of the sweep.

    There is a line for each value of the other options. The suffix of `path` decides the format.
    """
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    values = {name: {varied[name] for varied, _ in rows} for name in rows[0][0]}
    several = [name for name in values if len(values[name]) > 1]
    axis = next((name for name in several if all(isinstance(value, int | float) for value in values[name])), None)
    scores = [name for name in rows[0][1] if "_std" not in name]
    panels = [name for name in scores if name.startswith(("fid", "fd_"))]
    panels += [name for name in scores if "_score" in name]
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        others = {} if axis is None else {name: value for name, value in row[0].items() if name != axis}
        lines.setdefault(label(others), []).append(row)
    for panel, score in zip(axes, panels, strict=True):
        for (name, points), marker in zip(lines.items(), itertools.cycle("os^Dv"), strict=False):
            places = [label(varied) if axis is None else varied[axis] for varied, _ in points]
            panel.plot(places, [found[score] for _, found in points], marker=marker, markersize=4, label=name or None)
        panel.set_xlabel(AXES.get(axis, axis or ""))
        panel.set_ylabel(title_of(score))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if axis is None:
            panel.tick_params(axis="x", rotation=30)
    if len(lines) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)  # $ in a name is no formula
    with files.replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=160)


def title_of(score: str) -> str:
    """The title of an axis: fd_dinov2 as Fréchet distance (dinov2)."""
    name = next((name for name in TITLES if score == name or score.startswith(f"{name}_")), score)
    network = score.removeprefix(name).strip("_")
    return TITLES.get(name, name) + (f" ({network})" if network else "")


def grid_rows(labels: np.ndarray, classes: int = 10, columns: int = 10) -> list[list[int]]:
    """Numbers of images for a grid: `classes` evenly spread classes, one in each row, the first images of each."""
    known = np.unique(labels)
    chosen = known[np.linspace(0, len(known) - 1, min(classes, len(known))).astype(int)]
    rows = [np.flatnonzero(labels == one)[:columns].tolist() for one in chosen]
    return [row[: min(map(len, rows))] for row in rows]
