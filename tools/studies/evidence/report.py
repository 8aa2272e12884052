"""Write the page and the table of the study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import LogLocator
from PIL import Image

from diversedit_jax.analysis import drawing, html_page
from diversedit_jax.analysis.drawing import Panel, ReportFigure
from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime.files import write_text
from tools.studies.evidence.lanes import TIMES, Lane
from tools.studies.evidence.settings import BASELINE, CONTRASTS, FACTORS, MEASURED, PIECES, ROWS, TUNING_SEED
from tools.studies.evidence.statistics import Interval, at_time, paired_ratio
from tools.studies.evidence.study import Study

Results = Mapping[int, Mapping[int, Mapping[str, Any]]]  # seed -> step -> result


class Column(NamedTuple):
    """A column of the table: a number of a run at its last step."""

    title: str
    value: Any
    digits: int


def off_diagonal(result: Mapping[str, Any], name: str) -> float:
    """Return the mean of a matrix of blocks, without its diagonal."""
    matrix = np.array(result["blocks"][name])
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


COLUMNS = {
    "frechet": Column("Fréchet distance", lambda r: r["frechet"], 2),
    "kid": Column("kernel distance", lambda r: r["kid"], 3),
    "accuracy": Column("accuracy", lambda r: r["accuracy"], 3),
    "precision": Column("precision", lambda r: r["precision"], 3),
    "recall": Column("recall", lambda r: r["recall"], 3),
    "velocity": Column("velocity error", lambda r: float(np.mean(r["velocity"])), 4),
    "cka": Column("CKA of blocks", lambda r: off_diagonal(r, "cka"), 3),
    "centred": Column("centred cosine", lambda r: off_diagonal(r, "centred_cosine"), 3),
    "cosine": Column("cosine", lambda r: off_diagonal(r, "cosine"), 3),
    "mean_share": Column("share of the mean", lambda r: float(np.mean(r["blocks"]["mean_share"])), 3),
    "norm": Column("norm of the last block", lambda r: r["blocks"]["norm"][-1], 1),
    "rank": Column("effective rank", lambda r: float(np.mean(r["blocks"]["rank"])), 1),
    "active": Column("steps with weight > 0", lambda r: active(r), 3),
}


def active(result: Mapping[str, Any]) -> float:
    """Return the share of steps at which the diversity loss counted; NaN without it."""
    return float(np.mean([piece.get("diversity/active", np.nan) for piece in result["trace"]]))


def ends(results: Results, step: int, value: Any) -> dict[int, float]:
    """Return a number at a step, by seed."""
    return {seed: value(steps[step]) for seed, steps in results.items() if step in steps}


def cell(values: Mapping[int, float], digits: int) -> str:
    """Format a mean over seeds and its standard deviation."""
    found = np.array(list(values.values()))
    if not len(found) or np.isnan(found).all():
        return ""
    spread = f" ± {found.std(ddof=1):.{digits}f}" if len(found) > 1 else ""
    return f"{found.mean():.{digits}f}{spread}"


def ratio_at_time(results: Results, baseline: Results, last: int) -> Interval:
    """Return the ratio of Frechet distances when the faster of both has taken its last step, paired by seed."""
    pairs: tuple[dict[int, float], dict[int, float]] = {}, {}
    for seed in sorted(results.keys() & baseline.keys()):
        ours, theirs = results[seed], baseline[seed]
        if last in ours and last in theirs:
            when = min(ours[last]["seconds"], theirs[last]["seconds"])
            for found, steps in zip(pairs, (ours, theirs), strict=True):
                seconds, values = ([one[name] for one in steps.values()] for name in ("seconds", "frechet"))
                found[seed] = at_time(seconds, values, when)
    return paired_ratio(*pairs)


def write(study: Study) -> None:
    """Write OUT/report.html with its figures, and OUT/table.md, of all rows that have results."""
    last, size = study.size.steps // PIECES * PIECES, study.size
    found = {row: results for row in ROWS if ends(results := study.results(row), last, lambda r: r["frechet"])}
    rates = tuned_table(study)
    if not found and len(rates) == 1:
        raise ConfigError(f"{study.out} has no run of this size that is complete")
    drawn, summaries = tuning(study), [rates]
    if found:
        drawn = [
            ratios(study.out, found, last),
            *curves(study, found),
            samples(study, found, last),
            velocity(study.out, found, last),
            matrices(study.out, found, last),
            traces(study.out, found),
            *drawn,
        ]
        summaries = [*tables(study, found, last), course(found), contrasts(found, last), rates]
    notes = [
        "Primary endpoint, said in advance: the Fréchet distance at the last step, as the ratio to SiT of the same "
        "seed, with Student's 95% interval of its logarithm. Everything else is exploratory.",
        f"Fréchet distances are of {size.num:,} samples, on features of a small classifier "
        f"({study.judge.accuracy:.2%} of the held-out images). They compare rows of this study only.",
        "Times are compared within one call of the program only. Another call may have met a slower machine.",
        "A run here is short. Early training can favour other methods than late training: look at the curves.",
    ]
    settings = {
        **study.about(*ROWS),
        "data": " ".join([size.data[0], *(f"{name}={x}" for name, x in size.data[1].items() if name != "data_dir")]),
        "network": ", ".join(f"{name} {value}" for name, value in size.model.items()),
        "training": f"{last:,} steps of {size.batch}, learning rate {size.rate:g} x {' or '.join(map(str, FACTORS))}",
        "samples": ", ".join(f"{name} {value}" for name, value in size.sampler.items()),
        "digests": ", ".join(study.folder(row).name for row in found),
    }
    html_page.write(study.out / "report.html", "Evidence: methods on real images", summaries, drawn, notes, settings)
    lines = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    write_text(study.out / "table.md", "\n\n".join([*map(markdown, summaries), *notes, lines]) + "\n")
    print(f"{study.out / 'report.html'}, {study.out / 'table.md'}")


def tuned_table(study: Study) -> list[list[str]]:
    """Return the Frechet distances of all rows that were tuned, with a header."""
    table = [[f"Fréchet distance of tuning, seed {TUNING_SEED}", *(f"rate x {factor:g}" for factor in FACTORS)]]
    for row, (label, _) in ROWS.items():
        if len(values := study.tuned(row)) == len(FACTORS):
            table.append([label, *(f"{value:.2f}" for value in values.values())])
    return table


def tables(study: Study, found: Mapping[str, Results], last: int) -> tuple[list[list[str]], list[list[str]]]:
    """Return the table of scores and the table of blocks, each with its header."""
    first, second = ("frechet", "kid", "accuracy", "precision", "recall", "velocity"), tuple(COLUMNS)[6:]
    scores = [["method", "seeds", "rate", "ratio to SiT", "at equal time", "time of a step"]]
    scores[0] += [COLUMNS[name].title for name in first]
    blocks = [["method", *(COLUMNS[name].title for name in second)]]
    floor = study.judge.floor
    baseline = found.get(BASELINE, {})
    frechet = ends(baseline, last, lambda r: r["frechet"])
    seconds = ends(baseline, last, lambda r: r["seconds"])
    for row, results in found.items():
        own, time = ends(results, last, lambda r: r["frechet"]), ends(results, last, lambda r: r["seconds"])
        compared = row != BASELINE and bool(own.keys() & frechet.keys())
        line = [ROWS[row].label, str(len(own)), f"{study.factor(row):g}"]
        if compared:
            line += [str(paired_ratio(own, frechet))]
            times = [str(ratio_at_time(results, baseline, last)), f"{paired_ratio(time, seconds).value:.2f}"]
            line += times if timed(study, row) else [""] * 2
        else:
            line += ["1"] * 3 if row == BASELINE else [""] * 3
        scores.append(line + [cell(ends(results, last, COLUMNS[name].value), COLUMNS[name].digits) for name in first])
        values = [cell(ends(results, last, COLUMNS[name].value), COLUMNS[name].digits) for name in second]
        blocks.append([ROWS[row].label, *values])
    known = [f"{floor[name]:.{COLUMNS[name].digits}f}" if name in floor else "" for name in first]
    scores.append(["training images (floor)", "", "", "", "", "", *known])
    return scores, blocks


def course(found: Mapping[str, Results]) -> list[list[str]]:
    """Return the table of ratios to SiT at each step that was measured, with its header."""
    baseline = found.get(BASELINE, {})
    steps = sorted({step for one in baseline.values() for step in one})
    table = [["ratio to SiT after", *(f"{step:,} steps" for step in steps)]]
    for row, results in found.items():
        frechet = [[ends(one, step, lambda r: r["frechet"]) for one in (results, baseline)] for step in steps]
        if row != BASELINE and all(own.keys() & other.keys() for own, other in frechet):
            table.append([ROWS[row].label, *(str(paired_ratio(own, other)) for own, other in frechet)])
    return table


def contrasts(found: Mapping[str, Results], last: int) -> list[list[str]]:
    """Return the table of exploratory ratios, with its header."""
    table = [["exploratory, at the last step", "what", "ratio"]]
    for question, measure, row, against in CONTRASTS:
        if row in found and against in found:
            own, other = (ends(found[name], last, COLUMNS[measure].value) for name in (row, against))
            if own.keys() & other.keys():
                text = f"{COLUMNS[measure].title}, {ROWS[row].label} / {ROWS[against].label}"
                table.append([question, text, str(paired_ratio(own, other))])
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    head, *body = (f"| {' | '.join(line)} |" for line in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def ratios(folder: Path, found: Mapping[str, Results], last: int) -> ReportFigure:
    """Draw the primary endpoint."""
    baseline = ends(found.get(BASELINE, {}), last, lambda r: r["frechet"])
    shown = {
        row: paired_ratio(own, baseline)
        for row, results in found.items()
        if row != BASELINE and (own := ends(results, last, lambda r: r["frechet"])).keys() & baseline.keys()
    }
    rows = [[ROWS[row].label, *interval] for row, interval in shown.items()]
    size = (drawing.WIDTH, 0.8 + 0.24 * len(rows))
    with drawing.figure(folder, "ratios", ["method", "ratio", "low", "high"], rows, size) as figure:
        axes = figure.subplots()
        for place, interval in enumerate(shown.values()):
            axes.plot(interval[1:], [place, place], color=drawing.COLOURS[0])
            axes.plot(interval.value, place, "o", color=drawing.COLOURS[0])
        axes.axvline(1, color="0.6", linewidth=0.8)
        axes.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows], xscale="log")
        axes.set_xlabel("Fréchet distance / that of SiT with the same seed (log scale); left is better")
        ticks = [tick for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3) if _within(tick, shown.values())]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    return ReportFigure("ratios", "Primary endpoint", "Means over seeds with 95% intervals. One seed has no interval.")


def _within(tick: float, intervals: Sequence[Interval]) -> bool:
    values = [value for interval in intervals for value in interval if np.isfinite(value)]
    return tick == 1 or min(values, default=1) * 0.95 <= tick <= max(values, default=1) * 1.05


def timed(study: Study, row: str) -> bool:
    """Say whether a row and the baseline come from the same call. In another one the machine may have been slower."""
    return study.about(row) == study.about(BASELINE)


def curves(study: Study, found: Mapping[str, Results]) -> list[ReportFigure]:
    """Draw the Frechet distance against steps, and against the time of training."""
    drawn = []
    for name, place, title in (
        ("steps", lambda r: r["step"], "against steps"),
        ("time", lambda r: r["seconds"], "against time of training"),
    ):
        groups, rows = {}, []
        for row, results in found.items():
            whole = [steps for steps in results.values() if len(steps) == len(MEASURED)]
            if whole and (name == "steps" or timed(study, row)):
                places = np.mean([[place(result) for result in steps.values()] for steps in whole], axis=0).tolist()
                values = [[result["frechet"] for result in steps.values()] for steps in whole]
                groups[ROWS[row].label] = (places, values)
                rows += [[ROWS[row].label, x, *y] for x, y in zip(places, np.transpose(values), strict=True)]
        figure_name = f"frechet_{name}"
        with drawing.figure(
            study.out, figure_name, ["method", name, "of each seed"], rows, (drawing.WIDTH, 3.6)
        ) as figure:
            axes = figure.subplots()
            drawing.lines(axes, groups)
            axes.set(ylabel="Fréchet distance (log scale)", yscale="log", xscale="log")
            axes.set_xlabel("training step (log scale)" if name == "steps" else "seconds of training a run (log scale)")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
            if name == "steps":
                axes.set_xticks(sorted({x for places, _ in groups.values() for x in places}))
            axes.minorticks_off()
            drawing.legend(figure, axes)
        text = "Means over seeds; bands are one standard deviation."
        drawn.append(ReportFigure(figure_name, f"Fréchet distance {title}", text))
    return drawn


def samples(study: Study, found: Mapping[str, Results], last: int) -> ReportFigure:
    """Draw samples of every row, side by side, from the same noise and for the same classes."""
    rows, pictures = [], {"held-out images": study.shown()}
    for row, results in found.items():
        seed = min(seed for seed, steps in results.items() if last in steps)
        file = study.file(row, Lane(seed, study.factor(row)), last).with_suffix(".png")
        with Image.open(file, formats=("PNG",)) as image:
            pictures[ROWS[row].label] = np.asarray(image)
        rows.append([ROWS[row].label, seed, file.name])
    columns = 3
    lines = -(-len(pictures) // columns)
    shape = next(iter(pictures.values())).shape
    side = drawing.WIDTH / columns
    size = (drawing.WIDTH, lines * (side * shape[0] / shape[1] + 0.2))
    with drawing.figure(study.out, "samples", ["method", "seed", "file"], rows, size) as figure:
        for axes in (grid := figure.subplots(lines, columns, squeeze=False)).flat:
            axes.set_axis_off()
        for axes, (label, picture) in zip(grid.flat, pictures.items(), strict=False):
            axes.imshow(picture, cmap="gray", interpolation="nearest")
            axes.set_title(label)
    text = "At the last step, by the EMA network of the first seed. Every method has the same noise and classes."
    return ReportFigure("samples", "Samples", text)


def velocity(folder: Path, found: Mapping[str, Results], last: int) -> ReportFigure:
    """Draw the error of the velocity on held-out images, by time, as the ratio to the baseline."""
    base = found.get(BASELINE, next(iter(found.values())))
    reference = np.mean(list(ends(base, last, lambda r: r["velocity"]).values()), axis=0)
    groups = {
        ROWS[row].label: (
            TIMES,
            (np.array(list(ends(results, last, lambda r: r["velocity"]).values())) / reference).tolist(),
        )
        for row, results in found.items()
    }
    rows = [
        [label, t, *y]
        for label, (_, values) in groups.items()
        for t, y in zip(TIMES, np.transpose(values), strict=True)
    ]
    header = ["method", "t", "of each seed"]
    with drawing.figure(folder, "velocity", header, rows, (drawing.WIDTH, 3.2)) as figure:
        axes = figure.subplots()
        drawing.lines(axes, groups)
        axes.set(xlabel="t (0: data, 1: noise)", ylabel="error / mean error of SiT", xticks=TIMES)
        drawing.legend(figure, axes)
    text = "Mean squared error of the EMA network on held-out images. Means over seeds, bands: one standard deviation."
    return ReportFigure("velocity", "Error of the velocity", text)


def matrices(folder: Path, found: Mapping[str, Results], last: int) -> ReportFigure:
    """Draw how alike the blocks are."""
    columns, grid, names, rows = 5, [], [], []
    for name, title in {"cka": "CKA", "centred_cosine": "centred cosine"}.items():
        panels = []
        for row, results in found.items():
            matrix = np.mean(list(ends(results, last, lambda r, name=name: r["blocks"][name]).values()), axis=0)
            panels.append(Panel(ROWS[row].label.replace(", ", ",\n", 1), matrix))
            rows += drawing.entries([title, ROWS[row].label], matrix)
        parts = [panels[i : i + columns] for i in range(0, len(panels), columns)]
        grid, names = grid + parts, names + [title] * len(parts)
    with drawing.figure(folder, "blocks", ["measure", "method", "block", "block", "value"], rows) as figure:
        drawing.heatmaps(figure, grid, names, "similarity")
    text = (
        "Tokens of held-out images, means over three times and over seeds. The centred cosine leaves out what all "
        "tokens of a block share."
    )
    return ReportFigure("blocks", "How alike the blocks are", text)


def traces(folder: Path, found: Mapping[str, Results]) -> ReportFigure:
    """Draw the diversity loss and its weight during training."""
    shown = {
        "diversity/loss": "diversity loss",
        "diversity/active": "steps with weight > 0",
        "grad_norm": "gradient norm",
    }
    rows, groups = [], {}
    for name in shown:
        groups[name] = {}
        for row, results in found.items():
            runs = [
                [piece[name] for piece in steps[max(steps)]["trace"]]
                for steps in results.values()
                if name in steps[max(steps)]["trace"][0]
            ]
            if len(runs) == 0:  # a line without points, so that every method keeps its colour
                groups[name][ROWS[row].label] = ([], [[]])
            else:
                count = min(map(len, runs))
                places = (np.arange(1, count + 1) / PIECES).tolist()
                groups[name][ROWS[row].label] = (places, [run[:count] for run in runs])
                rows += [[name, ROWS[row].label, x, *(run[i] for run in runs)] for i, x in enumerate(places)]
    header = ["metric", "method", "part of the steps", "of each seed"]
    with drawing.figure(folder, "traces", header, rows, (drawing.WIDTH, 2.8)) as figure:
        for axes, (name, title) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
            drawing.lines(axes, groups[name])
            axes.set(title=title, xlabel="part of the steps")
        drawing.legend(figure, axes)
    text = (
        "Means over each eighth of the steps and over seeds. The weight of the released form is 0 below a loss of 0.1."
    )
    return ReportFigure("traces", "The diversity loss during training", text)


def tuning(study: Study) -> list[ReportFigure]:
    """Draw the Frechet distance of every row that was tuned, by learning rate; further forms of the method, too."""
    known = {row: scores for row in ROWS if len(scores := study.tuned(row)) == len(FACTORS)}
    if not known:
        return []
    rows = [[ROWS[row].label, *(scores[factor] for factor in FACTORS)] for row, scores in known.items()]
    header = ["method", *(f"rate x {factor:g}" for factor in FACTORS)]
    with drawing.figure(study.out, "tuning", header, rows, (drawing.WIDTH, 0.8 + 0.2 * len(rows))) as figure:
        axes = figure.subplots()
        for (colour, mark), factor in zip(drawing.MARKS, FACTORS, strict=False):
            values = [scores[factor] for scores in known.values()]
            axes.plot(values, range(len(values)), mark, color=colour, label=f"learning rate x {factor:g}")
        axes.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows], xscale="log")
        axes.set_xlabel(f"Fréchet distance at the last step, seed {TUNING_SEED} (log scale)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.25, linewidth=0.5)
        drawing.legend(figure, axes)
    text = "One seed, which the results above do not use: a choice of learning rates and of forms, and no evidence."
    return [ReportFigure("tuning", "Learning rates, and further forms", text)]
