"""What an evaluation leaves for people: a table, a CSV, a plot of a sweep, a grid of classes."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from diversedit_jax.runtime import files
from diversedit_jax.runtime.pictures import image_grid

# One row of a sweep: what was varied, in words, and the scores.
Row = tuple[Mapping[str, Any], Mapping[str, float]]
DISTANCES, QUALITIES = ("fid", "fd_"), ("inception_score",)


def said(value: Any) -> str:
    """An option's value in a word, fit for a file's name: (0.0, 0.7) as 0-0.7."""
    if isinstance(value, tuple | list):
        return "-".join(map(said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(varied: Mapping[str, Any]) -> str:
    """What distinguishes a point of a sweep, fit for the name of a folder."""
    return ",".join(f"{name}={said(value)}" for name, value in varied.items())


def table(rows: Sequence[Row]) -> str:
    """Scores for a terminal: one below the other for a single evaluation, a row for each point of a sweep.

    Of a sweep the float16 form of precision and recall is left to the CSV.
    """
    names = [name for name in rows[0][1] if "_std" not in name]
    if len(rows) == 1:
        (_, scores), width = rows[0], max(map(len, names), default=0)
        return "\n".join(f"  {name:<{width}}  {number(scores[name])}{spread(scores, name)}" for name in names)
    names = [name for name in names if "float16" not in name]
    cells = [[*map(str, rows[0][0]), *names]]
    cells += [[*map(said, varied.values()), *(number(scores[name]) for name in names)] for varied, scores in rows]
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]], left: int = 0) -> str:
    """Rows of text as columns for a terminal, the first so many to the left and the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    signs = ["<" if i < left else ">" for i in range(len(widths))]
    forms = [f"{{:{sign}{width}}}" for sign, width in zip(signs, widths, strict=True)]
    return "\n".join("  " + "  ".join(map(str.format, forms, row)) for row in cells)


def number(value: float) -> str:
    """Four digits after the point below 1, four significant ones below 100, two after the point above."""
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"


def spread(scores: Mapping[str, float], name: str) -> str:
    """The standard deviation that goes with a score, where there is one."""
    return f" ± {number(scores[f'{name}_std'])}" if f"{name}_std" in scores else ""


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each point, with all digits; opens in any spreadsheet."""
    lines = [[*map(said, varied.values()), *scores.values()] for varied, scores in rows]
    files.write_csv(path, [[*rows[0][0], *rows[0][1]], *lines])


def plot_sweep(path: Path, rows: Sequence[Row], title: str) -> None:
    """Distances and inception scores against the first option of a sweep that takes several numbers, else its points.

    A line for each value of the other options. The format is that of the path's suffix.
    """
    from matplotlib.figure import Figure  # no pyplot: it would look for a screen

    axis = next((name for name, value in rows[0][0].items() if _numeric(rows, name)), None)
    panels = [name for name in rows[0][1] if name.startswith(DISTANCES) and not name.endswith("_std")]
    panels += [name for name in rows[0][1] if name.startswith(QUALITIES) and "_std" not in name]
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        others = {} if axis is None else {name: value for name, value in row[0].items() if name != axis}
        lines.setdefault(label(others), []).append(row)
    for panel, score in zip(axes, panels, strict=True):
        for (name, points), marker in zip(lines.items(), itertools.cycle("os^Dv"), strict=False):
            places = [label(varied) if axis is None else varied[axis] for varied, _ in points]
            panel.plot(places, [scores[score] for _, scores in points], marker=marker, markersize=4, label=name or None)
        panel.set_xlabel(AXES.get(axis, axis or ""))
        panel.set_ylabel(title_of(score))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if axis is None:
            panel.tick_params(axis="x", rotation=30)
    if len(lines) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    with files.replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=160)


AXES = {"cfg_scale": "guidance scale"}
TITLES = {"fid": "FID", "fd": "Fréchet distance", "inception_score": "Inception score"}


def title_of(score: str) -> str:
    """What stands at an axis: fd_dinov2 as Fréchet distance (dinov2)."""
    name = next((name for name in TITLES if score == name or score.startswith(f"{name}_")), score)
    network = score.removeprefix(name).strip("_")
    return TITLES.get(name, name) + (f" ({network})" if network else "")


def _numeric(rows: Sequence[Row], name: str) -> bool:
    values = {row[0][name] for row in rows}
    return len(values) > 1 and all(isinstance(value, int | float) for value in values)


def class_grid(images: Mapping[int, np.ndarray], rows: Sequence[Sequence[int]]) -> UInt8[np.ndarray, "H W c"]:
    """Images by number as a grid, a class in each row."""
    return image_grid(np.stack([images[number] for row in rows for number in row]), columns=len(rows[0]))


def grid_rows(labels: np.ndarray, classes: int = 10, columns: int = 10) -> list[list[int]]:
    """Numbers of the images to show: the first of each of some classes, evenly spread, a class in each row."""
    known = np.unique(labels)
    chosen = known[np.linspace(0, len(known) - 1, min(classes, len(known))).astype(int)]
    found = [np.flatnonzero(labels == one)[:columns].tolist() for one in chosen]
    width = min(map(len, found))
    return [row[:width] for row in found]
