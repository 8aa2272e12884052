"""The figures of a report that are heatmaps or pictures, and the order of all figures. None: nothing to draw."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from diversedit_jax.analysis import curves, drawing, known_scores
from diversedit_jax.analysis.drawing import WIDTH, Panel, ReportFigure, by_label, entries, heatmaps, spaced
from diversedit_jax.analysis.study import Look, Study


def mean_matrix(looks: Sequence[Look], field: str = "similarity") -> Float[np.ndarray, "l m"]:
    """Average the similarity, or another matrix, over seeds."""
    return np.mean([getattr(look, field) for look in looks], axis=0)


def where(scale: str, studies: Sequence[Study]) -> str:
    """Say how and at which time checkpoints are compared."""
    return f"{scale}, t = {studies[0].looks[0].t:g}"


def fid_line(looks: Sequence[Look]) -> str:
    """Write the first distance that all these checkpoints have as a line of a title."""
    for name in looks[0].scores:
        if known_scores.is_distance(name) and all(name in look.scores for look in looks):
            return f"\n{known_scores.title(name)} {np.mean([look.scores[name] for look in looks]):.2f}"
    return ""


def blocks(folder: Path, studies: Sequence[Study], scale: str) -> ReportFigure:
    """Draw the last checkpoint of each setting, side by side."""
    groups = by_label([study.looks[-1] for study in studies])
    panels, table = [], []
    for label, looks in groups.items():
        steps = {look.step for look in looks}
        at = f"\nstep {looks[0].step:,}" if looks[0].step and len(steps) == 1 else ""
        panels.append(Panel(f"{label}{at}{fid_line(looks)}", mean_matrix(looks)))
        table += entries([label], mean_matrix(looks))
    with drawing.figure(folder, "blocks", ["label", "block", "other", "similarity"], table) as figure:
        heatmaps(figure, [panels[i : i + 4] for i in range(0, len(panels), 4)], None, "similarity")
    most = max(map(len, groups.values()))
    seeds = f", {most} seeds" if most > 1 else ""
    text = (
        f"Each cell compares two blocks at the last checkpoint ({where(scale, studies)}{seeds}). 1 is equal up to "
        "rotation and scale. The darker the picture off the diagonal, the more the blocks differ."
    )
    return ReportFigure("blocks", "How alike the blocks are", text)


def training(folder: Path, studies: Sequence[Study], scale: str) -> ReportFigure | None:
    """Draw the checkpoints over training, a row for each setting."""
    text = (
        f"The same comparison at checkpoints over training ({where(scale, studies)}), all on one colour scale. If the "
        "picture darkens from left to right, the blocks grow apart."
    )
    looks = [look for study in studies for look in study.looks]
    return _rows_of_looks(folder, ReportFigure("training", "Over training", text), looks, "step", "step {:,}")


def timesteps(folder: Path, studies: Sequence[Study], scale: str) -> ReportFigure | None:
    """Draw the last checkpoint at several times, a row for each setting."""
    text = (
        f"The last checkpoint at several times, where t = 0 is data and t = 1 is noise ({scale}). It shows whether the "
        "blocks differ more on clean images or on noisy ones."
    )
    looks = [look for study in studies for look in study.times]
    figure = ReportFigure("timesteps", "Over the times of the diffusion", text)
    return _rows_of_looks(folder, figure, looks, "t", "t = {:g}")


def _rows_of_looks(
    folder: Path, figure: ReportFigure, looks: Sequence[Look], axis: str, title: str
) -> ReportFigure | None:
    """Draw a row of heatmaps for each setting, and average seeds. None if no setting has two values on the axis.

    axis: `step` or `t`. title: of a heatmap, a format string.
    """
    rows, table = {}, []
    for label, group in by_label(looks).items():
        places: dict[float, list[Look]] = {}
        for look in group:
            places.setdefault(getattr(look, axis), []).append(look)
        for place, same in places.items():
            table += entries([label, place], mean_matrix(same))
        rows[label] = [Panel(title.format(x), mean_matrix(same)) for x, same in spaced(sorted(places.items()))]
    if max(map(len, rows.values()), default=0) < 2:
        return None
    with drawing.figure(folder, figure.name, ["label", axis, "block", "other", "similarity"], table) as drawn:
        heatmaps(drawn, list(rows.values()), list(rows) if len(rows) > 1 else None, "similarity")
    return figure


COSINES = {"same token": "token_cosine", "same token, centred": "centred_cosine", "mean tokens": "mean_cosine"}


def cosines(folder: Path, studies: Sequence[Study]) -> ReportFigure:
    """Draw the token-wise, the centred and the mean cosines of the last checkpoints."""
    groups = by_label([study.looks[-1] for study in studies])
    rows, table = {}, []
    for kind, field in COSINES.items():
        panels = [Panel(label, mean_matrix(looks, field)) for label, looks in groups.items()]
        table += [line for panel in panels for line in entries([panel.title, kind], panel.matrix)]
        rows[kind] = spaced(panels, 4)
    names, panels = list(rows), list(rows.values())
    if len(groups) == 1:
        names, panels = None, [[row[0]._replace(title=f"of the {kind}") for kind, row in rows.items()]]
    with drawing.figure(folder, "cosines", ["label", "of", "block", "other", "cosine"], table) as figure:
        heatmaps(figure, panels, names, "cosine")
    text = (
        "The mean cosine between the features of two blocks, for the same token and for the mean token of an image, as "
        "in the diversity loss; and for the same token without what all tokens share, which an offset cannot lower. "
        "Unlike CKA, a cosine changes when the features of one block are rotated."
    )
    return ReportFigure("cosines", "Cosines between blocks", text)


STREAMS = {  # title -> field of a look, what a row is, what a column is
    "image": ("pooled", "block of the image", "block of the image"),
    "text": ("text", "block of the text", "block of the text"),
    "image and text": ("between", "block of the image", "block of the text"),
}


def streams(folder: Path, studies: Sequence[Study]) -> ReportFigure | None:
    """Draw the blocks of the image stream, of the text stream and between both, at the last checkpoints."""
    groups = by_label([study.looks[-1] for study in studies if study.looks[-1].text is not None])
    if not groups:
        return None
    rows, table = {}, []
    for label, looks in groups.items():
        rows[label] = [Panel(title, mean_matrix(looks, field), *axes) for title, (field, *axes) in STREAMS.items()]
        table += [line for panel in rows[label] for line in entries([label, panel.title], panel.matrix)]
    shown = dict(spaced(list(rows.items()), 4))
    with drawing.figure(folder, "streams", ["label", "of", "block", "other", "similarity"], table) as figure:
        heatmaps(figure, list(shown.values()), list(shown) if len(shown) > 1 else None, "similarity")
    text = (
        "The blocks of the image stream, those of the text stream, and each block of one with each of the other. An "
        "example is the mean token of an image, or of a text without its padding. The last block gives no text."
    )
    return ReportFigure("streams", "Image and text", text)


def other_estimators(folder: Path, study: Study) -> ReportFigure | None:
    """Draw one checkpoint, compared in several ways."""
    if not study.estimators:
        return None
    panels = [Panel(name.replace(", ", "\n", 1), matrix) for name, matrix in study.estimators.items()]
    table = [line for name, matrix in study.estimators.items() for line in entries([name], matrix)]
    with drawing.figure(folder, "estimators", ["estimator", "block", "other", "similarity"], table) as figure:
        heatmaps(figure, [panels[i : i + 4] for i in range(0, len(panels), 4)], None, "similarity")
    text = (
        "The last checkpoint by other kernels, CKNNA and Procrustes. An example is an image's mean token (pooled), a "
        "token, or a whole image (minibatch CKA). CKA is unbiased unless its title says biased. Trust what all show."
    )
    return ReportFigure("estimators", f"Other ways to compare: {study.label}", text)


def pca(folder: Path, study: Study) -> ReportFigure | None:
    """Draw the principal components of the blocks' features as pictures."""
    if study.maps is None:
        return None
    images, maps, explained = study.maps
    chosen = spaced(range(len(maps)), 7)
    columns = len(chosen) + 1
    width = WIDTH * min(1, columns / 6)
    table = [[block + 1, float(share)] for block, share in enumerate(explained)]
    size = (width, width / columns * len(images) + 0.3)
    with drawing.figure(folder, "maps", ["block", "variance explained"], table, size) as figure:
        grid = figure.subplots(len(images), columns, squeeze=False)
        for i, image in enumerate(images):
            grid[i, 0].imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            for j, block in enumerate(chosen, 1):
                grid[i, j].imshow(maps[block][i], interpolation="nearest")
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        grid[0, 0].set_title("image")
        for j, block in enumerate(chosen, 1):
            grid[0, j].set_title(f"block {block + 1}\n{100 * explained[block]:.0f}%")
    text = (
        "The first three principal components of a block's tokens as red, green and blue, with their share of the "
        "variance. Tokens of one colour are alike. Colours of different blocks do not correspond."
    )
    return ReportFigure("maps", f"What blocks see: {study.label}", text)


def draw_all(folder: Path, studies: Sequence[Study], scale: str) -> list[ReportFigure]:
    """Draw every figure that the studies have something for."""
    drawn = [
        blocks(folder, studies, scale),
        streams(folder, studies),
        training(folder, studies, scale),
        curves.diversity(folder, studies),
        timesteps(folder, studies, scale),
        curves.against_scores(folder, studies),
        curves.per_block(folder, studies),
        curves.channels(folder, studies),
        curves.probe(folder, studies),
        curves.gradients(folder, studies),
        curves.connections(folder, studies),
        pca(folder, studies[0]),
        cosines(folder, studies),
        other_estimators(folder, studies[0]),
    ]
    return [figure for figure in drawn if figure is not None]
