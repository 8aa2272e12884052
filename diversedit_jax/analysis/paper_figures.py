"""Arrange checkpoints as the figures and the table of the paper (arXiv 2603.04239)."""

from collections.abc import Sequence
from pathlib import Path

from diversedit_jax.analysis import drawing, known_scores
from diversedit_jax.analysis.drawing import WIDTH, Panel, ReportFigure, by_label, entries, heatmaps, spaced
from diversedit_jax.analysis.heatmaps import fid_line, mean_matrix, timesteps, where
from diversedit_jax.analysis.study import Study
from diversedit_jax.runtime.files import write_text


def figure2(folder: Path, studies: Sequence[Study], scale: str) -> list[ReportFigure]:
    """Fig. 2: the first setting over training, then the others at their last checkpoint, four in a row."""
    (first, own), *others = by_label(studies).items()
    looks = [look for study in own for look in study.looks]
    over = [[look for look in looks if look.step == step] for step in spaced(sorted({look.step for look in looks}), 4)]
    last = [[study.looks[-1] for study in group] for _, group in others]
    rows = [over, *(last[i : i + 4] for i in range(0, len(last), 4))]
    panels = [
        [Panel(f"{same[0].label}\nstep {same[0].step:,}{fid_line(same)}", mean_matrix(same)) for same in row]
        for row in rows
    ]
    table = [line for same in over + last for line in entries([same[0].label, same[0].step], mean_matrix(same))]
    with drawing.figure(folder, "figure2", ["label", "step", "block", "other", "similarity"], table) as figure:
        heatmaps(figure, panels, None, "CKA")
    text = (
        f"The layout of the paper's Fig. 2 ({where(scale, studies)}): {first} over training in the first row, other "
        "settings at their last checkpoint below. The paper does not say what one example is, nor the bandwidth."
    )
    return [ReportFigure("figure2", "Figure 2", text)]


def figure_a2(folder: Path, studies: Sequence[Study], scale: str) -> list[ReportFigure]:
    """Fig. A2: the last checkpoint over timesteps."""
    drawn = timesteps(folder, studies, scale)
    return [] if drawn is None else [drawn._replace(title="Figure A2: over timesteps")]


TABLE_A2 = {
    "FID": ("fid", "fd", "frechet"),
    "sFID": ("sfid", "sfd"),
    "IS": ("inception",),
    "precision": ("precision",),
    "recall": ("recall",),
}


def table_a2(folder: Path, studies: Sequence[Study], scale: str) -> list[ReportFigure]:
    """Table A2: the scores of every checkpoint beside its similarity, also as Markdown and LaTeX."""
    looks = [look for study in studies for look in study.looks]
    chosen = {kind: known_scores.column([look.scores for look in looks], kinds) for kind, kinds in TABLE_A2.items()}
    header = ["run", "step", *(kind if name is None else known_scores.title(name) for kind, name in chosen.items())]
    header += ["mean CKA"]
    rows = [
        [look.label, look.step, *(look.scores.get(name) for name in chosen.values()), look.mean_similarity]
        for look in looks
    ]
    said = [[a, f"{b:,}", *("-" if cell is None else f"{cell:.4g}" for cell in cells)] for a, b, *cells in rows]
    markdown = [f"| {' | '.join(row)} |" for row in [header, *said]]
    markdown.insert(1, f"|{'---|' * len(header)}")
    escapes = str.maketrans({character: f"\\{character}" for character in "_%&"})
    latex = [rf"{' & '.join(cell.translate(escapes) for cell in row)} \\" for row in [header, *said]]
    latex = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", *latex, r"\end{tabular}"]
    write_text(folder / "table_a2.md", "\n".join(markdown) + "\n")
    write_text(folder / "table_a2.tex", "\n".join(latex) + "\n")
    with drawing.figure(folder, "table_a2", header, rows, (WIDTH, 0.3 + 0.24 * (len(rows) + 1))) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        table = axes.table(said, colLabels=header, loc="center", edges="horizontal")
        table.auto_set_font_size(False)
        table.auto_set_column_width(range(len(header)))
    text = (
        "The layout of the paper's Table A2, from the scores that the runs have: of each kind the one that most of "
        f"these checkpoints have. The last column is the mean over pairs of blocks ({where(scale, studies)})."
    )
    return [ReportFigure("table_a2", "Table A2", text)]


LAYOUTS = {"figure2": figure2, "figure_a2": figure_a2, "table_a2": table_a2}
