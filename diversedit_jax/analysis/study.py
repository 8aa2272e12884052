"""Analyse one network: every checkpoint at one time, then the last checkpoint in detail."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diversedit_jax import sharding
from diversedit_jax.analysis import features, gradient_conflict, known_scores, measure, pca_maps, skip_connections
from diversedit_jax.analysis.measure import Estimator, Measured, Settings
from diversedit_jax.api import AuxLoss
from diversedit_jax.metrics import similarity
from diversedit_jax.runs import build
from diversedit_jax.runs.trained import Trained

PARTS = {
    "times": "the last checkpoint at other times",
    "estimators": "CKA with other kernels and examples, CKNNA and Procrustes",
    "probe": "a linear probe of every block",
    "gradients": "the gradients of auxiliary losses against the objective's",
    "connections": "the weights of each long residual connection, and the loss without it",
    "maps": "principal components of features as pictures",
}
NEAREST = 10  # neighbours of CKNNA, as in its paper
FEW = 16  # batches for the parts that need gradients or many passes


class Look(NamedTuple):
    """One checkpoint at one time, see `measure.Measured`. l blocks, d channels.

    diversity: scores of `similarity.diversity`. usage: each channel's share of the variance, the largest first.
    scores: the known scores of this checkpoint's samples.
    text: similarity of the m blocks of a text stream, by the mean tokens of texts. text_diversity: its scores.
    pooled: similarity of the blocks of the image stream, by mean tokens. between: of both streams.
        These four are None without a text stream.
    """

    label: str
    step: int
    t: float
    similarity: Float[np.ndarray, "l l"]
    spread: float
    token_cosine: Float[np.ndarray, "l l"]
    mean_cosine: Float[np.ndarray, "l l"]
    centred_cosine: Float[np.ndarray, "l l"]
    diversity: Mapping[str, float]
    rank: Float[np.ndarray, " l"]
    participation: Float[np.ndarray, " l"]
    usage: Float[np.ndarray, "l d"]
    channels: Float[np.ndarray, " l"]
    norm: Float[np.ndarray, " l"]
    mean_share: Float[np.ndarray, " l"]
    scores: Mapping[str, float]
    text: Float[np.ndarray, "m m"] | None = None
    pooled: Float[np.ndarray, "l l"] | None = None
    between: Float[np.ndarray, "l m"] | None = None
    text_diversity: Mapping[str, float] | None = None

    @property
    def mean_similarity(self) -> float:
        """The mean similarity of two different blocks."""
        return 1 - self.diversity["all"]


class Study(NamedTuple):
    """What was found about one network.

    looks: its checkpoints at one time. times: its last checkpoint at other times. notes: what is left out, and why.
    All other fields are of the last checkpoint. None: not asked for, or this network has no such thing.
    """

    label: str
    looks: Sequence[Look]
    times: Sequence[Look]
    about: dict[str, Any]
    notes: Sequence[str]
    probe: Float[np.ndarray, " l"] | None = None
    pulls: Mapping[str, gradient_conflict.Pull] | None = None
    connections: skip_connections.Connections | None = None
    maps: pca_maps.Maps | None = None
    estimators: Mapping[str, Float[np.ndarray, "l l"]] | None = None


def study(
    found: Trained,
    steps: Sequence[int],
    settings: Settings,
    t: float,
    times: Sequence[float],
    parts: Sequence[str],
    say: Callable[[str], None],
    weights: str,
    supposed: Mapping[str, AuxLoss],
) -> Study:
    """Analyse the checkpoints of a network at these steps.

    say: called with a line of progress. weights: of `trained.WEIGHTS`. supposed: if the network was trained without
    auxiliary losses, the gradients of these are taken.
    """
    experiment, label, details, notes = found.experiment, found.label, {}, list(found.notes)
    frozen = build.frozen_weights(experiment.components.codec, experiment.layout)
    dataset = found.data(settings.split)
    say(f"{label}: {build.found(experiment.config, dataset)}, split {settings.split}")
    shown = measure.batches(dataset, settings, experiment.layout)
    ready, known = measure.compiled(experiment, settings), known_scores.found(found.workdir)
    looks, last, learned = [], None, None
    for step in steps:
        learned = last = None  # free a checkpoint before the next is read
        learned = features.learned(found, step, weights)
        last = measure.measure(ready, learned, frozen, shown, t)
        looks.append(look(label, step, t, last, known.get(step, {})))
        at = f", step {step}" if found.workdir else ""
        say(f"{label}{at}: mean CKA of two blocks {looks[-1].mean_similarity:.3f} at t = {t:g}")
    at_times = []
    for other in times if "times" in parts else ():
        measured = last if other == t else measure.measure(ready, learned, frozen, shown, other)
        at_times.append(look(label, step, other, measured, known.get(step, {})))

    if "probe" in parts and experiment.space.conditions.classes is None:
        notes.append("probes are left out: the conditions of these data are not labels")
    elif "probe" in parts:
        say(f"{label}: linear probes")
        fitted = measure.batches(found.data("train"), settings._replace(num=2 * settings.num), experiment.layout)
        tested = None if settings.split == "train" else shown
        details["probe"] = measure.probe_accuracies(ready, learned, frozen, fitted, tested, t)
    losses, few = experiment.components.losses or supposed, shown[:FEW]
    if "gradients" in parts and experiment.components.model.blocks is None:
        notes.append("gradients are left out: the model does not say which parameters are a block (Model.blocks)")
    elif "gradients" in parts and losses:
        say(f"{label}: gradients")
        details["pulls"] = gradient_conflict.pulls(experiment, losses, learned, frozen, few, step, settings.seed)
    if "connections" in parts:
        details["connections"] = skip_connections.used(experiment, learned, frozen, few, settings.seed)
    if "maps" in parts:
        details["maps"] = pca_maps.principal(experiment, learned, frozen, shown[0], t, seed=settings.seed)
    if "estimators" in parts:
        rotated = similarity.procrustes(list(jnp.asarray(last.rows["pooled"])))
        details["estimators"] = compared(last, settings.estimator) | {"Procrustes": np.asarray(rotated)}
    images = len(shown) * sharding.filled(settings.batch)
    about = found.about | {"steps": list(steps), "images": images, "of": len(dataset.source)}
    return Study(label, looks, at_times, about, notes, **details)


def faults(found: Study) -> list[str]:
    """Return a line for each part of a study that is not finite, with the cause where it shows.

    The cosine of a gradient that is 0 is not meant: it has none.
    """
    lines = []
    for one in (*found.looks, *found.times):
        checked = ("similarity", "token_cosine", "mean_cosine", "centred_cosine", "rank", "usage", "mean_share")
        wrong = [name for name in checked if not _finite(one, name)]
        still = [k for k, value in enumerate(np.diagonal(one.similarity), 1) if not np.isfinite(value)]
        broken = [k for k, value in enumerate(one.norm, 1) if not np.isfinite(value)]
        cause = ""
        if broken:
            cause = f": the features of blocks {', '.join(map(str, broken))} are not finite"
        elif still:
            cause = f": the features of blocks {', '.join(map(str, still))} are the same for all examples"
        wrong += [] if one.text is None or _finite(one, "text") else ["similarity of the text stream"]
        if wrong or broken:
            lines.append(f"step {one.step}, t = {one.t:g}: {', '.join(wrong)} not finite{cause}")
    details = [name for name in ("probe", "connections", "maps", "estimators") if not _finite(found, name)]
    return lines + [f"{name}: not finite" for name in details]


def _finite(found: Look | Study, name: str) -> bool:
    leaves = map(np.asarray, jax.tree.leaves(getattr(found, name)))
    return all(np.isfinite(leaf).all() for leaf in leaves if np.issubdtype(leaf.dtype, np.floating))


def look(label: str, step: int, t: float, found: Measured, known: Mapping[str, float]) -> Look:
    """Summarise a measurement. known: scores of the samples."""
    covariance = jnp.asarray(found.covariance)
    rank, participation = similarity.effective_rank(covariance), similarity.participation_ratio(covariance)
    usage = similarity.channel_usage(covariance)
    by_block = map(np.asarray, (rank, participation, jnp.sort(usage, axis=1)[:, ::-1], similarity.channels_used(usage)))
    diversity = {name: float(x) for name, x in similarity.diversity(jnp.asarray(found.similarity)).items()}
    pairs = found.similarity, found.spread, found.token_cosine, found.mean_cosine, found.centred_cosine
    made = Look(label, step, t, *pairs, diversity, *by_block, found.norm, found.mean_share, dict(known))
    if found.both is None:
        return made
    pooled, between, text = parted(found)
    return made._replace(text=text, pooled=pooled, between=between, text_diversity=text_diversity(text))


def parted(found: Measured) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split the similarity of both streams: within the image [l l], between both [l m], within the text [m m]."""
    blocks = len(found.similarity)
    return found.both[:blocks, :blocks], found.both[:blocks, blocks:], found.both[blocks:, blocks:]


def text_diversity(text: Float[np.ndarray, "m m"]) -> dict[str, float]:
    """Score the text stream by `similarity.diversity`, without `mirrored`: block L - 1 gives no text for block 0."""
    scores = similarity.diversity(jnp.asarray(text))
    return {name: float(value) for name, value in scores.items() if name != "mirrored"}


def compared(found: Measured, chosen: Estimator) -> dict[str, Float[np.ndarray, "l l"]]:
    """Compare the blocks by every kernel and kind of example, and by CKNNA."""
    pooled, others = found.rows["pooled"], {}
    for unit in ("pooled", "token"):
        for kernel in similarity.KERNELS:
            estimator = chosen._replace(unit=unit, kernel=kernel, hsic="unbiased")
            others[f"{kernel}, {unit}"] = measure.similar(estimator, found.rows[unit])
    for kernel in similarity.KERNELS:
        others[f"{kernel}, image"] = found.minibatch["image", kernel]
    biased = chosen._replace(unit="pooled", kernel="linear", hsic="biased")
    others["linear, pooled, biased"] = measure.similar(biased, pooled)
    if len(pooled[0]) > NEAREST:
        units = [jnp.asarray(row / np.linalg.norm(row, axis=1, keepdims=True)) for row in pooled]
        others[f"CKNNA, {NEAREST} nearest"] = np.asarray(jax.jit(similarity.cknna, static_argnums=1)(units, NEAREST))
    return others
