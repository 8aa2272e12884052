"""The figures of a report that are heatmaps or pictures, and the order of all; None where there is nothing to draw."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from diversedit_jax.analysis import curves, known_scores
from diversedit_jax.analysis.drawing import (
    WIDTH,
    Panel,
    Plate,
    by_label,
    drawing,
    entries,
    heatmaps,
    spaced,
)
from diversedit_jax.analysis.study import Close, Look, Study


def mean_matrix(looks: Sequence[Look]) -> Float[np.ndarray, "l l"]:
    """The mean similarity over seeds."""
    return np.mean([one.similarity for one in looks], axis=0)


def seeds(count: int) -> str:
    """How many runs stand behind a number."""
    return f", {count} seeds" if count > 1 else ""


def where(scale: str, studies: Sequence[Study]) -> str:
    """How and at which time checkpoints are compared."""
    return f"{scale}, t = {studies[0].looks[0].t:g}"


def fid_line(looks: Sequence[Look]) -> str:
    """The first distance that all these checkpoints have, as a line of a title."""
    names = [
        name for name in looks[0].scores if known_scores.is_distance(name) and all(name in one.scores for one in looks)
    ]
    if not names:
        return ""
    return f"\n{known_scores.title(names[0])} {np.mean([one.scores[names[0]] for one in looks]):.2f}"


def blocks(folder: Path, studies: Sequence[Study], scale: str) -> Plate:
    """The last checkpoint of each setting, side by side."""
    groups = by_label([one.looks[-1] for one in studies])
    panels = []
    for label, looks in groups.items():
        steps = sorted({one.step for one in looks})
        at = f"\nstep {steps[0]:,}" if steps[0] and len(steps) == 1 else ""
        panels.append(Panel(f"{label}{at}{fid_line(looks)}", mean_matrix(looks)))
    rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
    table = [line for label, looks in groups.items() for line in entries([label], mean_matrix(looks))]
    with drawing(folder, "blocks", ["label", "block", "other", "similarity"], table) as figure:
        heatmaps(figure, rows, None, "similarity")
    most = max(map(len, groups.values()))
    return Plate(
        "blocks",
        "How alike the blocks are",
        f"Each cell compares two blocks at the last checkpoint ({where(scale, studies)}{seeds(most)}): 1 is the same "
        "representation up to rotation and scale. A darker picture off the diagonal is a network whose blocks differ "
        "more.",
        folder,
    )


def training(folder: Path, studies: Sequence[Study], scale: str) -> Plate | None:
    """Checkpoints over training, a row for each setting; None where no setting has several."""
    text = (
        f"The same comparison at checkpoints over training ({where(scale, studies)}), all on one colour scale. A "
        "picture that darkens from left to right belongs to a network whose blocks grow apart."
    )
    groups = {label: [one.looks for one in group] for label, group in by_label(studies).items()}
    plate = Plate("training", "Over training", text, folder)
    return _rows_of_looks(plate, groups, "step", lambda look: look.step, "step {:,}")


def timesteps(folder: Path, studies: Sequence[Study], scale: str) -> Plate | None:
    """The last checkpoint at several times, a row for each setting."""
    text = (
        f"The last checkpoint at several times, where t = 0 is data and t = 1 is noise ({scale}). It shows whether the "
        "blocks differ more on clean images or on noisy ones."
    )
    groups = {label: [one.times for one in group] for label, group in by_label(studies).items()}
    plate = Plate("timesteps", "Over the times of the diffusion", text, folder)
    return _rows_of_looks(plate, groups, "t", lambda look: look.t, "t = {:g}")


def _rows_of_looks(
    plate: Plate,
    groups: Mapping[str, Sequence[Sequence[Look]]],
    axis: str,
    place_of: Callable[[Look], float],
    said: str,
) -> Plate | None:
    """A row of heatmaps for each setting; seeds are averaged where they have the same place on an axis.

    said: how a place is written. None where no setting has two places.
    """
    rows, names, table = [], [], []
    for label, seeds_of in groups.items():
        places: dict[float, list[Look]] = {}
        for one in itertools.chain(*seeds_of):
            places.setdefault(place_of(one), []).append(one)
        for place, looks in places.items():
            table += entries([label, place], mean_matrix(looks))
        if places:
            chosen = spaced(sorted(places.items()))
            rows.append([Panel(said.format(place), mean_matrix(looks)) for place, looks in chosen])
            names.append(label)
    if not rows or max(map(len, rows)) < 2:
        return None
    with drawing(plate.folder, plate.name, ["label", axis, "block", "other", "similarity"], table) as figure:
        heatmaps(figure, rows, names if len(rows) > 1 else None, "similarity")
    return plate


def cosines(folder: Path, studies: Sequence[Study]) -> Plate:
    """Token-wise and mean cosines of the last checkpoints."""
    groups = by_label([one.looks[-1] for one in studies])
    kinds = {"same token": "token_cosine", "mean tokens": "mean_cosine"}
    rows, table = [], []
    for kind, field in kinds.items():
        means = {label: np.mean([getattr(one, field) for one in looks], axis=0) for label, looks in groups.items()}
        rows.append([Panel(label, matrix) for label, matrix in spaced(list(means.items()), 4)])
        table += [line for label, matrix in means.items() for line in entries([label, kind], matrix)]
    names: list[str] | None = list(kinds)
    if len(groups) == 1:
        rows, names = [[Panel(f"of the {kind}", row[0].matrix) for kind, row in zip(kinds, rows, strict=True)]], None
    with drawing(folder, "cosines", ["label", "of", "block", "other", "cosine"], table) as figure:
        heatmaps(figure, rows, names, "cosine")
    return Plate(
        "cosines",
        "Cosines between blocks",
        "The mean cosine between two blocks' features of the same token, and of the same image's mean token: "
        "what the terms of the diversity loss are made of. Unlike CKA it changes when features are rotated, "
        "so blocks may look different here and alike above.",
        folder,
    )


def other_estimators(folder: Path, close: Close) -> Plate | None:
    """One checkpoint, compared in several ways."""
    if not close.estimators:
        return None
    panels = [Panel(name.replace(", ", "\n", 1), matrix) for name, matrix in close.estimators.items()]
    rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
    table = [line for name, matrix in close.estimators.items() for line in entries([name], matrix)]
    with drawing(folder, "estimators", ["estimator", "block", "other", "similarity"], table) as figure:
        heatmaps(figure, rows, None, "similarity")
    return Plate(
        "estimators",
        f"Other ways to compare: {close.label}",
        "The last checkpoint by other kernels and other choices of what one example is: an image's mean token "
        "(pooled), a token, or a whole image (minibatch CKA), all unbiased unless it says so, and by CKNNA and "
        "Procrustes. A pattern that does not depend on the choice is a finding; one that does is a matter of taste.",
        folder,
    )


def pca(folder: Path, close: Close) -> Plate | None:
    """Principal components of the blocks' features as pictures."""
    if close.maps is None:
        return None
    chosen = spaced(range(len(close.maps.maps)), 7)
    table = [[block + 1, float(share)] for block, share in enumerate(close.maps.explained)]
    images = close.maps.images
    with drawing(folder, "maps", ["block", "variance explained"], table) as figure:
        columns = len(chosen) + 1
        figure.set_size_inches(WIDTH * min(1, columns / 6), WIDTH * min(1, columns / 6) / columns * len(images) + 0.3)
        grid = figure.subplots(len(images), columns, squeeze=False)
        for i, image in enumerate(images):
            grid[i, 0].imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            for j, block in enumerate(chosen, 1):
                grid[i, j].imshow(close.maps.maps[block][i], interpolation="nearest")
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        grid[0, 0].set_title("image")
        for j, block in enumerate(chosen, 1):
            grid[0, j].set_title(f"block {block + 1}\n{100 * close.maps.explained[block]:.0f}%")
    return Plate(
        "maps",
        f"What blocks see: {close.label}",
        "The first three principal components of each block's tokens as red, green and blue, with the share of the "
        "variance that they explain. Regions of one colour are tokens that the block holds to be alike; colours of "
        "different blocks do not correspond.",
        folder,
    )


def draw_all(folder: Path, studies: Sequence[Study], scale: str) -> list[Plate]:
    """Every figure that the studies have something for."""
    first = studies[0].close
    drawn = [
        blocks(folder, studies, scale),
        training(folder, studies, scale),
        curves.diversity(folder, studies),
        timesteps(folder, studies, scale),
        curves.against_scores(folder, studies),
        curves.per_block(folder, studies),
        curves.channels(folder, studies),
        curves.probe(folder, studies),
        curves.gradients(folder, studies),
        curves.connections(folder, studies),
        pca(folder, first),
        cosines(folder, studies),
        other_estimators(folder, first),
    ]
    return [one for one in drawn if one is not None]
