"""Write reports as pages: one HTML file that holds everything it shows and loads nothing."""

import base64
import html
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from diversedit_jax.analysis.drawing import DPI, ReportFigure
from diversedit_jax.runtime.files import write_text

PIXELS_PER_INCH = 140  # of a figure, on a wide page

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #1b1b1b;
  background: #fff; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 46rem; }
img { display: block; max-width: 100%; height: auto; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: 1rem 0; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; margin: 1rem 0; }
a { color: #0057a8; }
small, dd { color: #555; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dd { margin: 0; min-width: 0; }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
figure { margin: 0; }
figcaption { font-size: .85rem; color: #555; }
.row { display: flex; flex-wrap: wrap; align-items: flex-end; gap: .3rem .8rem; }
summary { cursor: pointer; }
.words td { text-align: left; white-space: normal; font-size: .85rem; padding: .1rem .7rem .1rem 0; }
.changed { font-weight: 600; }
@media (max-width: 44rem) { .wide img { max-width: 40rem; } }
@media (max-width: 32rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; font-weight: 600; } }
@media print { nav, .files { display: none; } section { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(
    path: Path,
    title: str,
    summaries: Sequence[Sequence[Sequence[str]]],
    drawn: Sequence[ReportFigure],
    notes: Sequence[str],
    settings: Mapping[str, str],
) -> None:
    """Write the report of an analysis beside its figures.

    summaries: tables, header first; those after the first come after the figures. settings: what can change a number.
    """
    parts = [
        table(summaries[0]),
        "<nav>" + "".join(f'<a href="#{one.name}">{html.escape(one.title)}</a>' for one in drawn) + "</nav>",
        *(f"<p><strong>Note.</strong> {html.escape(note)}</p>" for note in notes),
        *(_section(path.parent, one) for one in drawn),
        *map(table, summaries[1:]),
        "<h2>Settings</h2>",
        listed(settings),
    ]
    write_page(path, title, parts)


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page of these parts, which are HTML, below its title."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        *parts,
        "</body></html>",
    ]
    write_text(path, "\n".join(lines) + "\n")


def listed(values: Mapping[str, str]) -> str:
    """A list of names and values."""
    lines = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in values.items())
    return f"<dl>{''.join(lines)}</dl>"


def picture(content: bytes, text: str, width: int, kind: str = "png") -> str:
    """An image that is part of the page. text: what it shows. width: in pixels of the page."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img alt="{html.escape(text)}" width="{width}" src="{source}">'


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table, its header first."""
    head, *body = ([html.escape(cell) for cell in row] for row in rows)
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _section(folder: Path, one: ReportFigure) -> str:
    png, numbers = ((folder / f"{one.name}.{suffix}").read_bytes() for suffix in ("png", "csv"))
    (pixels,) = struct.unpack(">I", png[16:20])  # the width in the header of a PNG
    title, image = html.escape(one.title), picture(png, one.title, round(pixels * PIXELS_PER_INCH / DPI))
    numbers = base64.b64encode(numbers).decode()
    return (
        f'<section id="{one.name}"><h2>{title}</h2><p>{html.escape(one.text)}</p>'
        f'<div class="wide">{image}</div>'
        f'<small class="files"><a download="{one.name}.csv" href="data:text/csv;base64,{numbers}">{one.name}.csv</a>; '
        f"it was written with {one.name}.png and {one.name}.svg</small></section>"
    )
