"""The figures of a report that are curves; None where the studies have nothing for one."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from diversedit_jax.analysis import known_scores
from diversedit_jax.analysis.drawing import (
    COLOUR_MAP,
    COLOURS,
    MARKERS,
    WIDTH,
    Plate,
    block_ticks,
    by_label,
    drawing,
    legend,
    lines,
    spaced,
    thousands,
)
from diversedit_jax.analysis.study import Study
from diversedit_jax.metrics.similarity import DIVERSITIES

SCORES = {
    "all": "all pairs",
    "adjacent": "neighbours",
    "mirrored": "mirror images\n(long residuals)",
    "distant": "far pairs weighted",
}


def diversity(folder: Path, studies: Sequence[Study]) -> Plate | None:
    """Scores of diversity against training steps."""
    groups = {}
    for label, group in by_label(studies).items():
        common = sorted(set.intersection(*({one.step for one in study.looks} for study in group)))
        looks = [[one for one in study.looks if one.step in common] for study in group]
        groups[label] = (common, looks)
    if max(len(common) for common, _ in groups.values()) < 2:
        return None
    table = [
        [study.label, number, one.step, *(one.diversity[name] for name in DIVERSITIES), one.spread]
        for number, study in enumerate(studies)
        for one in study.looks
    ]
    header = ["label", "run", "step", *DIVERSITIES, "spread_over_noise"]
    with drawing(folder, "diversity", header, table) as figure:
        figure.set_size_inches(WIDTH, 2.1)
        for axes, (name, title) in zip(figure.subplots(1, 4, sharey=True), SCORES.items(), strict=True):
            values = {
                label: (common, [[one.diversity[name] for one in looks] for looks in runs])
                for label, (common, runs) in groups.items()
            }
            lines(axes, values)
            axes.set(xlabel="training step", title=title)
            axes.xaxis.set_major_formatter(thousands)
        figure.axes[0].set_ylabel("mean of 1 - similarity")
        legend(figure, figure.axes[0])
    return Plate(
        "diversity",
        "Diversity against training step",
        "One number for a network: the mean of 1 - similarity over all pairs of blocks, over neighbours, over the "
        "pairs that a long residual connection joins, and with far pairs weighted by their distance. Higher is more "
        "diverse; bands are one standard deviation over seeds.",
        folder,
    )


def against_scores(folder: Path, studies: Sequence[Study]) -> Plate | None:
    """Off-diagonal similarity of checkpoints against a distance of their samples, where it is known."""
    points = [one for study in studies for one in study.looks]
    names = [name for name in dict.fromkeys(n for one in points for n in one.scores) if known_scores.is_distance(name)]
    names = [name for name in names if sum(name in one.scores for one in points) >= 3][:3]
    if not names:
        return None
    table = [
        [one.label, one.step, 1 - one.diversity["all"], *(one.scores.get(name, "") for name in names)] for one in points
    ]
    with drawing(folder, "scores", ["label", "step", "mean similarity", *names], table) as figure:
        figure.set_size_inches(min(WIDTH, 0.4 + 2.6 * len(names)), 2.5)
        correlations = []
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            known = [one for one in points if name in one.scores]
            x, y = [1 - one.diversity["all"] for one in known], [one.scores[name] for one in known]
            for label, colour, marker in zip(
                by_label(points), itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False
            ):
                own = [i for i, one in enumerate(known) if one.label == label]
                axes.scatter([x[i] for i in own], [y[i] for i in own], color=colour, marker=marker, s=16, label=label)
            axes.set(xlabel="mean similarity of two blocks", ylabel=known_scores.title(name))
            if min(y) > 0 and max(y) > 10 * min(y):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25, linewidth=0.5)
            if len(set(x)) > 1 and min(y) > 0:
                r = float(np.corrcoef(x, np.log(y))[0, 1])
                correlations.append(f"{r:.2f} ({known_scores.title(name)}, {len(x)} checkpoints)")
        legend(figure, figure.axes[0])
    said = f" Pearson's r with the log of the distance: {'; '.join(correlations)}." if correlations else ""
    return Plate(
        "scores",
        "Similarity against the quality of samples",
        "Each point is a checkpoint: how alike its blocks are, and how far its samples are from data (lower is better)."
        f"{said} Checkpoints of one run are not independent, and a correlation is not a cause.",
        folder,
    )


PER_BLOCK = {
    "rank": "effective rank",
    "participation": "participation ratio",
    "channels": "channels used",
    "norm": "length of a token",
}


def per_block(folder: Path, studies: Sequence[Study]) -> Plate:
    """Ranks, channels and lengths by block at the last checkpoint."""
    groups = by_label([one.looks[-1] for one in studies])
    table = [
        [label, number, block + 1, *(float(getattr(one, name)[block]) for name in PER_BLOCK)]
        for label, looks in groups.items()
        for number, one in enumerate(looks)
        for block in range(len(one.rank))
    ]
    with drawing(folder, "ranks", ["label", "seed", "block", *PER_BLOCK], table) as figure:
        figure.set_size_inches(WIDTH, 2.0)
        for axes, (name, title) in zip(figure.subplots(1, 4), PER_BLOCK.items(), strict=True):
            lines(axes, {k: (range(1, len(v[0].rank) + 1), [getattr(x, name) for x in v]) for k, v in groups.items()})
            axes.set(xlabel="block", title=title)
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, figure.axes[0])
    width = len(studies[0].looks[-1].usage[0])
    return Plate(
        "ranks",
        "How rich each block is",
        f"Effective rank and participation ratio count the directions that the features of a block fill (at most "
        f"{width}); channels used counts the channels that share the variance. The length of a token shows where the "
        "residual stream grows.",
        folder,
    )


def channels(folder: Path, studies: Sequence[Study]) -> Plate:
    """The share of variance of each channel, largest first, by block."""
    groups = {
        label: np.mean([o.usage for o in v], axis=0) for label, v in by_label([s.looks[-1] for s in studies]).items()
    }
    table = [
        [label, block + 1, place + 1, float(share)]
        for label, usage in groups.items()
        for block, row in enumerate(usage)
        for place, share in enumerate(row)
    ]
    shown = spaced(list(groups.items()), 4)
    with drawing(folder, "channels", ["label", "block", "place", "share"], table) as figure:
        figure.set_size_inches(min(WIDTH, 1.2 + 1.9 * len(shown)), 2.1)
        grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (label, usage) in zip(grid, shown, strict=True):
            colours = matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 0.95, len(usage)))
            for block, (row, colour) in enumerate(zip(usage, colours, strict=True)):
                axes.plot(np.arange(1, len(row) + 1), 100 * row, color=colour, label=f"block {block + 1}")
            axes.axhline(100 / usage.shape[1], color="0.5", linewidth=0.8, linestyle=":")
            axes.set(title=label, xlabel="channel, by its share", yscale="log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25, linewidth=0.5)
        grid[0].set_ylabel("share of variance, %")
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(1, len(colours)), COLOUR_MAP)
        bar = figure.colorbar(scale, ax=grid, label="block", ticks=block_ticks(len(colours)))
        bar.outline.set_visible(False)
    return Plate(
        "channels",
        "How evenly the channels are used",
        "The share of each channel in the variance of its block, the largest first; the dotted line is an even share. "
        "A steep line is a block that few channels dominate.",
        folder,
    )


def probe(folder: Path, studies: Sequence[Study]) -> Plate | None:
    """The accuracy of linear probes by block."""
    groups = by_label([one.close for one in studies if one.close.probe is not None])
    if not groups:
        return None
    table = [
        [label, number, block + 1, float(accuracy)]
        for label, group in groups.items()
        for number, one in enumerate(group)
        for block, accuracy in enumerate(one.probe)
    ]
    with drawing(folder, "probe", ["label", "seed", "block", "accuracy"], table) as figure:
        figure.set_size_inches(3.4, 2.5)
        axes = figure.subplots()
        lines(
            axes,
            {k: (range(1, len(v[0].probe) + 1), [100 * np.asarray(x.probe) for x in v]) for k, v in groups.items()},
        )
        axes.set(xlabel="block", ylabel="accuracy of a linear probe, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, axes)
    return Plate(
        "probe",
        "What a linear probe reads",
        "A ridge classifier is fitted to the mean token of every block, for training images, and tested on others, at "
        "the time that the heatmaps show. The network is given the label of no class, so that it cannot tell the probe "
        "the answer.",
        folder,
    )


def gradients(folder: Path, studies: Sequence[Study]) -> Plate | None:
    """The gradients of auxiliary losses against the objective's, by block."""
    found = {}
    for label, group in by_label([one.close for one in studies if one.close.pulls]).items():
        for loss in group[0].pulls:
            name = f"{label}: {loss}" if len(studies) > 1 else loss
            found[name] = [one.pulls[loss] for one in group if loss in one.pulls]
    if not found:
        return None
    table = [
        [name, number, block + 1, float(pull.cosine[block]), float(pull.spread[block]), float(pull.ratio[block])]
        for name, pulls in found.items()
        for number, pull in enumerate(pulls)
        for block in range(len(pull.cosine))
    ]
    header = ["loss", "seed", "block", "cosine", "spread_over_batches", "ratio"]
    with drawing(folder, "gradients", header, table) as figure:
        figure.set_size_inches(5.6, 2.5)
        for axes, field, title in zip(
            figure.subplots(1, 2),
            ("cosine", "ratio"),
            ("cosine with the objective's", "length beside the objective's"),
            strict=True,
        ):
            groups = {
                name: (range(1, len(pulls[0].cosine) + 1), [getattr(pull, field) for pull in pulls])
                for name, pulls in found.items()
            }
            lines(axes, groups)
            axes.set(xlabel="block", title=title)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.axes[0].axhline(0, color="0.4", linewidth=0.8)
        figure.axes[1].set_ylim(bottom=0)
        legend(figure, figure.axes[0])
    return Plate(
        "gradients",
        "Do auxiliary losses pull with the objective?",
        "The cosine between the gradients of an auxiliary loss and of the objective in the parameters of each block: "
        "below 0 they work against each other. The diversity loss stands at full weight, also where its adaptive "
        "weight is 0; where a network was not trained with it, it shows what it would ask for.",
        folder,
    )


def connections(folder: Path, studies: Sequence[Study]) -> Plate | None:
    """The norms of the merging Linears, and the loss without each connection."""
    groups = by_label([one.close for one in studies if one.close.connections is not None])
    if not groups:
        return None
    table = []
    for label, group in groups.items():
        for number, one in enumerate(group):
            c = one.connections
            for m, (shallow, deep) in enumerate(c.pairs):
                table.append([label, number, shallow, deep, *map(float, (c.current[m], c.skip[m], c.loss, c.cut[m]))])
            table.append([label, number, "all", "all", "", "", c.loss, c.all_cut])
    header = ["label", "seed", "shallow", "deep", "norm_current", "norm_skip", "loss", "loss_cut"]
    with drawing(folder, "connections", header, table) as figure:
        figure.set_size_inches(5.6, 2.5)
        left, right = figure.subplots(1, 2)
        share = {}
        worse = {}
        for label, group in groups.items():
            places = [deep for _, deep in group[0].connections.pairs]
            share[label] = (places, [x.connections.skip / (x.connections.skip + x.connections.current) for x in group])
            worse[label] = (places, [100 * (x.connections.cut / x.connections.loss - 1) for x in group])
        lines(left, share)
        left.axhline(0.5, color="0.5", linewidth=0.8, linestyle=":")
        left.set(xlabel="deep block", title="share of the skip in the Linear's norm", ylim=(0, 1))
        lines(right, worse)
        right.set(xlabel="deep block", title="loss if it is cut, % more")
        right.axhline(0, color="0.4", linewidth=0.8)
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
        legend(figure, left)
    all_cut = {k: 100 * np.mean([x.connections.all_cut / x.connections.loss - 1 for x in v]) for k, v in groups.items()}
    said = "; ".join(f"{label}: {more:+.0f}%" for label, more in all_cut.items())
    return Plate(
        "connections",
        "How much each long residual connection is used",
        "Left, how much of the merging Linear reads the shallow block rather than the current stream; right, how much "
        f"the objective grows when that half is set to 0, one connection at a time. All of them cut at once: {said}.",
        folder,
    )
