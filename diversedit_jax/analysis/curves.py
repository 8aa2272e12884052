"""The figures of a report that are curves. A function returns None if the studies have nothing for its figure."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from diversedit_jax.analysis import drawing, known_scores
from diversedit_jax.analysis.drawing import WIDTH, ReportFigure, by_label, legend, lines, spaced, thousands
from diversedit_jax.analysis.study import Study
from diversedit_jax.metrics.similarity import DIVERSITIES

SCORES = {
    "all": "all pairs",
    "adjacent": "neighbours",
    "mirrored": "mirror images\n(long residuals)",
    "distant": "far pairs weighted",
}


def diversity(folder: Path, studies: Sequence[Study]) -> ReportFigure | None:
    """Draw the scores of diversity against training steps."""
    groups = {}
    for label, group in by_label(studies).items():
        common = sorted(set.intersection(*({look.step for look in study.looks} for study in group)))
        groups[label] = (common, [[look for look in study.looks if look.step in common] for study in group])
    if max(len(common) for common, _ in groups.values()) < 2:
        return None
    table = [
        [study.label, number, look.step, *(look.diversity[name] for name in DIVERSITIES), look.spread]
        for number, study in enumerate(studies)
        for look in study.looks
    ]
    header = ["label", "run", "step", *DIVERSITIES, "spread_over_noise"]
    with drawing.figure(folder, "diversity", header, table, (WIDTH, 2.1)) as figure:
        for axes, (name, title) in zip(figure.subplots(1, 4, sharey=True), SCORES.items(), strict=True):
            values = {
                label: (common, [[look.diversity[name] for look in looks] for looks in runs])
                for label, (common, runs) in groups.items()
            }
            lines(axes, values)
            axes.set(xlabel="training step", title=title)
            axes.xaxis.set_major_formatter(thousands)
        figure.axes[0].set_ylabel("mean of 1 - similarity")
        legend(figure, figure.axes[0])
    text = (
        "The mean of 1 - similarity over all pairs of blocks, over neighbours, over the pairs of long residuals, and "
        "over all pairs weighted by distance. Higher is more diverse. Bands are one standard deviation over seeds."
    )
    return ReportFigure("diversity", "Diversity against training step", text)


def against_scores(folder: Path, studies: Sequence[Study]) -> ReportFigure | None:
    """Draw the mean similarity of checkpoints against the distances of their samples, as far as they are known."""
    looks = [look for study in studies for look in study.looks]
    counts = Counter(name for look in looks for name in look.scores if known_scores.is_distance(name))
    names = [name for name, count in counts.items() if count >= 3][:3]
    if not names:
        return None
    table = [
        [look.label, look.step, look.mean_similarity, *(look.scores.get(name, "") for name in names)] for look in looks
    ]
    header, correlations = ["label", "step", "mean similarity", *names], []
    with drawing.figure(folder, "scores", header, table, (min(WIDTH, 0.4 + 2.6 * len(names)), 2.5)) as figure:
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            known = [look for look in looks if name in look.scores]
            x, y = [look.mean_similarity for look in known], [look.scores[name] for look in known]
            for label, (colour, marker) in zip(by_label(looks), itertools.cycle(drawing.MARKS), strict=False):
                own = [i for i, look in enumerate(known) if look.label == label]
                axes.scatter([x[i] for i in own], [y[i] for i in own], color=colour, marker=marker, s=16, label=label)
            axes.set(xlabel="mean similarity of two blocks", ylabel=known_scores.title(name))
            if min(y) > 0 and max(y) > 10 * min(y):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25, linewidth=0.5)
            if min(len(set(x)), len(set(y))) > 1 and min(y) > 0:
                r = float(np.corrcoef(x, np.log(y))[0, 1])
                correlations.append(f"{r:.2f} ({known_scores.title(name)}, {len(x)} checkpoints)")
        legend(figure, figure.axes[0])
    said = f" Pearson's r with the log of the distance: {'; '.join(correlations)}." if correlations else ""
    text = (
        "Each point is a checkpoint: how alike its blocks are, and how far its samples are from data (lower is better)."
        f"{said} Checkpoints of one run are not independent, and a correlation is not a cause."
    )
    return ReportFigure("scores", "Similarity against the quality of samples", text)


def channels(folder: Path, studies: Sequence[Study]) -> ReportFigure:
    """Draw the share of variance of each channel, the largest first, by block."""
    groups = by_label([study.looks[-1] for study in studies])
    usages = {label: np.mean([look.usage for look in looks], axis=0) for label, looks in groups.items()}
    table = [
        [label, block + 1, place + 1, float(share)]
        for label, usage in usages.items()
        for (block, place), share in np.ndenumerate(usage)
    ]
    shown, header = spaced(list(usages.items()), 4), ["label", "block", "place", "share"]
    with drawing.figure(folder, "channels", header, table, (min(WIDTH, 1.2 + 1.9 * len(shown)), 2.1)) as figure:
        grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (label, usage) in zip(grid, shown, strict=True):
            colours = matplotlib.colormaps[drawing.COLOUR_MAP](np.linspace(0, 0.95, len(usage)))
            for row, colour in zip(usage, colours, strict=True):
                axes.plot(np.arange(1, len(row) + 1), 100 * row, color=colour)
            axes.axhline(100 / usage.shape[1], color="0.5", linewidth=0.8, linestyle=":")
            axes.set(title=label, xlabel="channel, by its share", yscale="log")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25, linewidth=0.5)
        grid[0].set_ylabel("share of variance, %")
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(1, len(colours)), drawing.COLOUR_MAP)
        bar = figure.colorbar(scale, ax=grid, label="block", ticks=drawing.block_ticks(len(colours)))
        bar.outline.set_visible(False)
    text = (
        "The share of each channel in the variance of its block, the largest first. The dotted line is an even share. "
        "A steep line is a block that few channels dominate."
    )
    return ReportFigure("channels", "How evenly the channels are used", text)


def block_table(groups: Mapping[str, Sequence[Any]], fields: Sequence[str]) -> list[drawing.Row]:
    """List the values of some fields, [l] each, as rows of a CSV: label, seed, block, values."""
    return [
        [label, seed, block + 1, *(float(getattr(one, field)[block]) for field in fields)]
        for label, group in groups.items()
        for seed, one in enumerate(group)
        for block in range(len(getattr(one, fields[0])))
    ]


def block_lines(axes: Axes, groups: Mapping[str, Sequence[Any]], field: str, factor: int = 1) -> None:
    """Draw `factor` times a field over the blocks, a line for each label."""
    values = {label: [factor * np.asarray(getattr(one, field)) for one in group] for label, group in groups.items()}
    lines(axes, {label: (range(1, len(seeds[0]) + 1), seeds) for label, seeds in values.items()})
    axes.set(xlabel="block", xticks=drawing.block_ticks(max(len(seeds[0]) for seeds in values.values())))


PER_BLOCK = {
    "rank": "effective rank",
    "participation": "participation ratio",
    "channels": "channels used",
    "norm": "length of a token",
    "mean_share": "share of the mean",
}


def per_block(folder: Path, studies: Sequence[Study]) -> ReportFigure:
    """Draw ranks, channels, lengths and shares of the mean by block at the last checkpoint."""
    groups = by_label([study.looks[-1] for study in studies])
    table = block_table(groups, list(PER_BLOCK))
    with drawing.figure(folder, "ranks", ["label", "seed", "block", *PER_BLOCK], table, (WIDTH, 2.0)) as figure:
        for axes, (field, title) in zip(figure.subplots(1, len(PER_BLOCK)), PER_BLOCK.items(), strict=True):
            block_lines(axes, groups, field)
            axes.set_title(title)
            axes.set_ylim(bottom=0)
        legend(figure, figure.axes[0])
    width = len(studies[0].looks[-1].usage[0])
    text = (
        f"Effective rank and participation ratio: how many directions the features fill, at most {width}. Channels "
        "used: how many channels share the variance. Length of a token: where the residual stream grows. Share of the "
        "mean: how much of the energy of a block is the same in all tokens."
    )
    return ReportFigure("ranks", "How rich each block is", text)


def probe(folder: Path, studies: Sequence[Study]) -> ReportFigure | None:
    """Draw the accuracy of linear probes by block."""
    groups = by_label([study for study in studies if study.probe is not None])
    if not groups:
        return None
    table = block_table(groups, ["probe"])
    with drawing.figure(folder, "probe", ["label", "seed", "block", "accuracy"], table, (3.4, 2.5)) as figure:
        axes = figure.subplots()
        block_lines(axes, groups, "probe", 100)
        axes.set_ylabel("accuracy of a linear probe, %")
        legend(figure, axes)
    text = (
        "A ridge classifier reads the mean token of a block, at the time that the heatmaps show. It is fitted to "
        "training images and tested on others. The network gets the null label, so it cannot give the answer away."
    )
    return ReportFigure("probe", "What a linear probe reads", text)


def gradients(folder: Path, studies: Sequence[Study]) -> ReportFigure | None:
    """Draw the gradients of auxiliary losses against the objective's, by block."""
    groups = {}
    for label, group in by_label([study for study in studies if study.pulls]).items():
        for loss in group[0].pulls:
            name = f"{label}: {loss}" if len(studies) > 1 else loss
            groups[name] = [study.pulls[loss] for study in group if loss in study.pulls]
    if not groups:
        return None
    header = ["loss", "seed", "block", "cosine", "spread_over_batches", "ratio"]
    table = block_table(groups, ["cosine", "spread", "ratio"])
    with drawing.figure(folder, "gradients", header, table, (5.6, 2.5)) as figure:
        left, right = figure.subplots(1, 2)
        block_lines(left, groups, "cosine")
        left.set_title("cosine with the objective's")
        left.axhline(0, color="0.4", linewidth=0.8)
        block_lines(right, groups, "ratio")
        right.set_title("length beside the objective's")
        right.set_ylim(bottom=0)
        legend(figure, left)
    text = (
        "The cosine between the gradients of an auxiliary loss and of the objective, by block. Below 0 they work "
        "against each other. Losses have their full weight. (not trained): the network was trained without this loss."
    )
    return ReportFigure("gradients", "Do auxiliary losses pull with the objective?", text)


def connections(folder: Path, studies: Sequence[Study]) -> ReportFigure | None:
    """Draw the norms of each skip connection's weights, and the loss without the connection."""
    groups = by_label([study for study in studies if study.connections is not None])
    groups = {label: [study.connections for study in group] for label, group in groups.items()}
    if not groups:
        return None
    table = []
    for label, group in groups.items():
        for seed, found in enumerate(group):
            for pair, *norms, cut in zip(found.pairs, found.current, found.skip, found.cut, strict=True):
                table.append([label, seed, *pair, *map(float, (*norms, found.loss, cut))])
            table.append([label, seed, "all", "all", "", "", found.loss, found.all_cut])
    header = ["label", "seed", "from_block", "to_block", "norm_current", "norm_skip", "loss", "loss_cut"]
    places = {label: [to_block for _, to_block in group[0].pairs] for label, group in groups.items()}
    with drawing.figure(folder, "connections", header, table, (5.6, 2.5)) as figure:
        left, right = figure.subplots(1, 2)
        lines(left, {k: (places[k], [x.skip / (x.skip + x.current) for x in v]) for k, v in groups.items()})
        left.axhline(0.5, color="0.5", linewidth=0.8, linestyle=":")
        left.set(title="share of the skip in the norm of the weights", ylim=(0, 1))
        lines(right, {k: (places[k], [100 * (x.cut / x.loss - 1) for x in v]) for k, v in groups.items()})
        right.set_title("increase of the loss without it, %")
        right.axhline(0, color="0.4", linewidth=0.8)
        for axes in (left, right):
            axes.set_xlabel("block that reads the skip")
            axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, left)
    all_cut = {label: 100 * np.mean([x.all_cut / x.loss - 1 for x in group]) for label, group in groups.items()}
    said = "; ".join(f"{label}: {more:+.0f}%" for label, more in all_cut.items())
    text = (
        "Left: how much the weights of a connection read the earlier block rather than the current stream. Right: how "
        f"much the objective grows when one connection is cut. With all of them cut: {said}."
    )
    return ReportFigure("connections", "How much each long residual connection is used", text)
