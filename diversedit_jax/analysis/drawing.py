"""Draw figures in one style. Each is a PNG, an SVG and a CSV of the same name, with colours for the colour-blind."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from diversedit_jax.runtime.files import replacing, write_csv

STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "diversedit_jax",  # the same figure is the same file
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
MARKS = tuple(zip(COLOURS, "os^Dv<P", strict=True))
STYLES = ("-", "--", ":")  # of the first lines, of those that take the same marks again, and again
COLOUR_MAP = "viridis"
WIDTH = 7.0  # inches, of a page of two columns
DPI = 200

Row = Sequence[Any]
Size = tuple[float, float]


class ReportFigure(NamedTuple):
    """A figure of a report, in NAME.png, NAME.svg and NAME.csv. text: what it shows and how to read it."""

    name: str
    title: str
    text: str


class Panel(NamedTuple):
    """A heatmap and its title. down, across: what a row and a column are."""

    title: str
    matrix: Float[np.ndarray, "l m"]
    down: str = "block"
    across: str = "block"


@contextlib.contextmanager
def figure(folder: Path, name: str, header: Row, rows: Sequence[Row], size: Size | None = None) -> Iterator[Figure]:
    """Yield a new figure, then write it as NAME.png and NAME.svg. NAME.csv gets the rows. size: in inches."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(size, layout="constrained")
        yield drawn
        for text in drawn.findobj(Text):  # in names, two $ would begin and end a formula
            if "$" in text.get_text() and "mathdefault" not in text.get_text():  # as the ticks of logarithmic axes
                text.set_parse_math(False)
        for kind, options in {"png": {}, "svg": {"metadata": {"Date": None}}}.items():
            with replacing(folder / f"{name}.{kind}") as partial:
                drawn.savefig(partial, format=kind, dpi=DPI, **options)
            drawn.set_layout_engine("none")  # the places that the first file got are those of the next
    write_csv(folder / f"{name}.csv", [header, *rows])


def by_label(items: Sequence[Any]) -> dict[str, list[Any]]:
    """Group items by their label: one label is one setting, its items are seeds."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def spaced(items: Sequence[Any], most: int = 6) -> list[Any]:
    """Choose at most `most` items at even distances, the first and the last among them."""
    places = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))
    return [items[i] for i in places]


def heat(axes: Axes, panel: Panel, low: float) -> Any:
    """Draw a matrix of similarities; blocks count from 1. Up to 6 blocks, the cells show their numbers."""
    blocks, others = panel.matrix.shape
    image = axes.imshow(panel.matrix, vmin=low, vmax=1, cmap=COLOUR_MAP, extent=(0.5, others + 0.5, blocks + 0.5, 0.5))
    axes.set(xticks=block_ticks(others), yticks=block_ticks(blocks))
    axes.set_title(panel.title)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if blocks <= 6:
        for i, j in np.ndindex(blocks, others):
            value = panel.matrix[i, j]
            text = f"{value:.2f}".replace("0.", ".", 1) if 0 <= value < 1 else f"{value:.2f}"
            colour = "white" if value < (1 + low) / 2 else "black"
            axes.text(j + 1, i + 1, text, ha="center", va="center", fontsize=6, color=colour)
    return image


def block_ticks(blocks: int) -> list[int]:
    """Choose the ticks of an axis of blocks: all of up to 6, else five."""
    return np.unique(np.linspace(1, blocks, blocks if blocks <= 6 else 5).round()).astype(int).tolist()


def heatmaps(figure: Figure, rows: Sequence[Sequence[Panel]], names: Sequence[str] | None, scale: str) -> None:
    """Draw rows of heatmaps on one colour scale. names: of the rows. scale: the label of the colour bar."""
    columns = max(map(len, rows))
    side = min((WIDTH - 0.9) / max(columns, 3), 1.9)
    above = [0.16 * (1 + max(panel.title.count("\n") for panel in row)) for row in rows]  # the titles' lines
    figure.set_size_inches(max(side * columns + 1.1, 3.2), (side + 0.16) * len(rows) + sum(above) + 0.2)
    finite = [panel.matrix for row in rows for panel in row if np.isfinite(panel.matrix).any()]
    least = min((float(np.nanmin(matrix)) for matrix in finite), default=0.0)
    low = min(np.floor(least * 10) / 10, 0.9)  # of the colour scale
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for axes in grid[i, len(row) :]:
            axes.set_axis_off()
        for j, (axes, panel) in enumerate(zip(grid[i], row, strict=False)):
            image = heat(axes, panel, low)
            if i == len(rows) - 1 or j >= len(rows[i + 1]):
                axes.set_xlabel(panel.across)
            if j == 0:
                axes.set_ylabel(f"{names[i]}\n{panel.down}" if names else panel.down)
            elif panel.down != row[j - 1].down:
                axes.set_ylabel(panel.down)
    bar = figure.colorbar(image, ax=grid, shrink=min(1, 1.6 / (side * len(rows) + 0.1)), aspect=16, pad=0.02)
    bar.set_label(scale)
    bar.outline.set_visible(False)


def rendered(matrix: Float[np.ndarray, "l l"], scale: str) -> UInt8[np.ndarray, "h w 3"]:
    """Draw one heatmap as an image."""
    with matplotlib.rc_context(STYLE), io.BytesIO() as file:
        figure = Figure(layout="constrained")
        heatmaps(figure, [[Panel("", matrix)]], None, scale)
        figure.savefig(file, format="png", dpi=DPI)
        with Image.open(file, formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))


def entries(prefix: Row, matrix: Float[np.ndarray, "l m"]) -> list[Row]:
    """List a matrix as rows of a CSV: prefix, block, block, value."""
    return [[*prefix, i + 1, j + 1, float(matrix[i, j])] for i, j in np.ndindex(*matrix.shape)]


def lines(axes: Axes, groups: Mapping[str, tuple[Sequence[int | float], Sequence[Any]]]) -> None:
    """Draw a line for each label: the mean over seeds, with a band of one standard deviation.

    groups: label -> (places, for each seed a value at every place).
    """
    for number, (label, (places, values)) in enumerate(groups.items()):
        (colour, marker), style = MARKS[number % len(MARKS)], STYLES[number // len(MARKS) % len(STYLES)]
        values = np.asarray(values, float)
        mean = values.mean(axis=0)
        axes.plot(places, mean, style, color=colour, marker=marker, label=label)
        if len(values) > 1:
            spread = values.std(axis=0, ddof=1)
            axes.fill_between(places, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0)
    axes.grid(alpha=0.25, linewidth=0.5)


def legend(figure: Figure, axes: Axes) -> None:
    """Draw one legend above the figure, in as many columns as fit; none for a single line."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        width, height = figure.get_size_inches()
        each = 0.55 + 0.062 * max(map(len, labels))  # inches
        columns = max(1, min(len(labels), int(width / each)))
        figure.set_size_inches(width, height + 0.15 * -(-len(labels) // columns))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def thousands(value: float, _position: int = 0) -> str:
    """Format a tick as 500, 50k or 1.5M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (abs(value) >= size and value % (size / 10) == 0):
            return f"{value / size:g}{unit}"
    return f"{value:g}"
