"""Layouts of the paper's figures and table (arXiv 2603.04239), of given checkpoints."""

from collections.abc import Sequence
from pathlib import Path

from diversedit_jax.analysis import known_scores
from diversedit_jax.analysis.drawing import WIDTH, Panel, Plate, by_label, drawing, entries, heatmaps, spaced
from diversedit_jax.analysis.heatmaps import fid_line, mean_matrix, timesteps, where
from diversedit_jax.analysis.study import Study
from diversedit_jax.runtime.files import write_text


def figure2(folder: Path, studies: Sequence[Study], scale: str) -> list[Plate]:
    """Fig. 2: the first setting over training, then the others at their last checkpoint, four in a row."""
    (first, own), *others = by_label(studies).items()
    over = spaced(sorted({one.step for study in own for one in study.looks}), 4)
    rows = [[]]
    for step in over:
        looks = [one for study in own for one in study.looks if one.step == step]
        rows[0].append((f"{first}\nstep {step:,}{fid_line(looks)}", looks))
    last = [(label, [study.looks[-1] for study in group]) for label, group in others]
    last = [(f"{label}\nstep {looks[0].step:,}{fid_line(looks)}", looks) for label, looks in last]
    rows += [last[i : i + 4] for i in range(0, len(last), 4)]
    panels = [[Panel(title, mean_matrix(looks)) for title, looks in row] for row in rows]
    table = [
        line
        for row in rows
        for _, looks in row
        for line in entries([looks[0].label, looks[0].step], mean_matrix(looks))
    ]
    with drawing(folder, "figure2", ["label", "step", "block", "other", "similarity"], table) as figure:
        heatmaps(figure, panels, None, "CKA")
    text = (
        f"The layout of the paper's Fig. 2 ({where(scale, studies)}): {first} over training in the first row, other "
        "settings at their last checkpoint below. The paper does not say what one example is, nor the bandwidth."
    )
    return [Plate("figure2", "Figure 2", text, folder)]


def figure_a2(folder: Path, studies: Sequence[Study], scale: str) -> list[Plate]:
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


def table_a2(folder: Path, studies: Sequence[Study], scale: str) -> list[Plate]:
    """Table A2: the scores of every checkpoint that has some, beside its similarity; also as Markdown and LaTeX."""
    looks = [one for study in studies for one in study.looks]
    chosen = {kind: known_scores.column([one.scores for one in looks], kinds) for kind, kinds in TABLE_A2.items()}
    header = ["run", "step", *(kind if name is None else known_scores.title(name) for kind, name in chosen.items())]
    header += ["mean CKA"]
    rows = [
        [one.label, one.step, *(one.scores.get(name) for name in chosen.values()), 1 - one.diversity["all"]]
        for one in looks
    ]
    said = [[a, f"{b:,}", *("-" if cell is None else f"{cell:.4g}" for cell in cells)] for a, b, *cells in rows]
    latex = [
        [cell.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&") for cell in row] for row in [header, *said]
    ]
    texts = {
        ".md": [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in said)],
        ".tex": [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            *(rf"{' & '.join(row)} \\" for row in latex),
            r"\end{tabular}",
        ],
    }
    for suffix, written in texts.items():
        write_text(folder / f"table_a2{suffix}", "\n".join(written) + "\n")
    with drawing(folder, "table_a2", header, rows) as figure:
        figure.set_size_inches(WIDTH, 0.3 + 0.24 * (len(rows) + 1))
        axes = figure.subplots()
        axes.set_axis_off()
        table = axes.table(said, colLabels=header, loc="center", edges="horizontal")
        table.auto_set_font_size(False)
        table.auto_set_column_width(range(len(header)))
    text = (
        "The layout of the paper's Table A2, from the scores that the runs have: of each kind the one that most of "
        f"these checkpoints have. The last column is the mean over pairs of blocks ({where(scale, studies)})."
    )
    return [Plate("table_a2", "Table A2", text, folder)]


LAYOUTS = {"figure2": figure2, "figure_a2": figure_a2, "table_a2": table_a2}
