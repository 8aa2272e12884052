"""One network, looked into: every checkpoint at one time, and the last one closely."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax.analysis import (
    features,
    gradient_conflict,
    known_scores,
    linear_probes,
    measure,
    pca_maps,
    skip_connections,
)
from diversedit_jax.analysis.gradient_conflict import Pull
from diversedit_jax.analysis.measure import Estimator, Measured, Settings
from diversedit_jax.analysis.pca_maps import Maps
from diversedit_jax.analysis.skip_connections import Connections
from diversedit_jax.api import AuxLoss, Batch
from diversedit_jax.metrics import similarity
from diversedit_jax.runs.build import frozen_weights
from diversedit_jax.runs.trained import Trained

PARTS = {
    "times": "the last checkpoint at other times",
    "estimators": "CKA with other kernels and examples, CKNNA and Procrustes",
    "probe": "a linear probe of every block",
    "gradients": "the gradients of auxiliary losses against the objective's",
    "connections": "what each long residual connection weighs, and the loss without it",
    "maps": "principal components of features as pictures",
}
NEAREST = 10  # neighbours of CKNNA, as in its paper
FEW = 16  # batches for what needs gradients or many passes


class Look(NamedTuple):
    """One checkpoint at one time; l blocks, d channels. Means over draws of noise.

    diversity: scores of `similarity.diversity`. usage: shares of variance of the channels, largest first. scores: of
    the samples of this checkpoint, as far as they are known.
    """

    label: str
    step: int
    t: float
    similarity: Float[np.ndarray, "l l"]
    spread: float
    token_cosine: Float[np.ndarray, "l l"]
    mean_cosine: Float[np.ndarray, "l l"]
    diversity: Mapping[str, float]
    rank: Float[np.ndarray, " l"]
    participation: Float[np.ndarray, " l"]
    usage: Float[np.ndarray, "l d"]
    channels: Float[np.ndarray, " l"]
    norm: Float[np.ndarray, " l"]
    scores: Mapping[str, float]


class Close(NamedTuple):
    """The last checkpoint, closely; None for parts that were not asked for or cannot be had."""

    label: str
    step: int
    probe: Float[np.ndarray, " l"] | None = None
    pulls: Mapping[str, Pull] | None = None
    connections: Connections | None = None
    maps: Maps | None = None
    estimators: Mapping[str, Float[np.ndarray, "l l"]] | None = None


class Study(NamedTuple):
    """A subject's checkpoints at time t, its last one at all times, and closely; what could not be had, in words."""

    label: str
    looks: Sequence[Look]
    times: Sequence[Look]
    close: Close
    about: dict[str, Any]
    notes: Sequence[str]


def study(
    found: Trained,
    steps: Sequence[int],
    settings: Settings,
    t: float,
    times: Sequence[float],
    parts: Sequence[str],
    say: Callable[[str], None],
    weights: str = "ema",
    supposed: Mapping[str, AuxLoss] | None = None,
) -> Study:
    """Look into a network at these steps; `say` gets a line now and then.

    weights: of `trained.WEIGHTS`. supposed: the losses whose gradients are taken where the network has none.
    """
    experiment, label = found.experiment, found.label
    frozen = frozen_weights(experiment.components.codec, experiment.layout)
    dataset = found.data(settings.split)
    shown = measure.batches(dataset, settings, experiment.layout)
    ready, known = measure.compiled(experiment, settings), known_scores.found(found.workdir)
    looks, last, learned = [], None, None
    for step in steps:
        learned = last = None  # freed before the next are read
        learned = features.learned(found, step, weights)
        last = measure.measure(ready, learned, frozen, shown, t)
        looks.append(look(label, step, t, last, known.get(step, {})))
        at = f", step {step}" if found.workdir else ""
        say(f"{label}{at}: mean CKA of two blocks {1 - looks[-1].diversity['all']:.3f} at t = {t:g}")
    at_times = []
    for other in times if "times" in parts else ():
        one = last if other == t else measure.measure(ready, learned, frozen, shown, other)
        at_times.append(look(label, steps[-1], other, one, known.get(steps[-1], {})))
    seen, notes = closely(found, ready, learned, frozen, shown, steps[-1], t, parts, say, supposed or {})
    if "estimators" in parts:
        seen["estimators"] = estimators(last, settings.estimator)
    used = sum(map(measure.count_of, shown))
    about = found.about | {"steps": list(steps), "images": used, "of": len(dataset.source)}
    return Study(label, looks, at_times, Close(label, steps[-1], **seen), about, [*found.notes, *notes])


def closely(
    found: Trained,
    ready: measure.Pass,
    learned: features.Learned,
    frozen: Any,
    shown: Sequence[Batch],
    step: int,
    t: float,
    parts: Sequence[str],
    say: Callable[[str], None],
    supposed: Mapping[str, AuxLoss],
) -> tuple[dict[str, Any], list[str]]:
    """The parts that look at one checkpoint, by their field of `Close`; and what could not be had, in words."""
    experiment, settings, label = found.experiment, ready.settings, found.label
    seen, notes = {}, []
    if "probe" in parts:
        if experiment.space.conditions.classes is None:
            notes.append("probes are left out: the conditions of these data are not labels")
        else:
            say(f"{label}: linear probes")
            fitted = measure.batches(found.data("train"), settings._replace(num=2 * settings.num), experiment.layout)
            tested = None if settings.split == "train" else shown
            seen["probe"] = linear_probes.accuracies(ready, learned, frozen, fitted, tested, t)
    if "gradients" in parts:
        losses = experiment.components.losses or supposed
        if experiment.components.model.blocks is None:
            notes.append("gradients are left out: the model does not tell its blocks (Model.blocks)")
        elif losses:
            say(f"{label}: gradients")
            seen["pulls"] = gradient_conflict.pulls(
                experiment, losses, learned, frozen, shown[:FEW], step, settings.seed
            )
    if "connections" in parts:
        seen["connections"] = skip_connections.used(experiment, learned, frozen, shown[:FEW], settings.seed)
    if "maps" in parts:
        seen["maps"] = pca_maps.principal(experiment, learned, frozen, shown[0], t, seed=settings.seed)
    return seen, notes


def look(label: str, step: int, t: float, found: Measured, known: Mapping[str, float]) -> Look:
    """What is kept of a measurement."""
    covariance = jnp.asarray(found.covariance)
    usage = similarity.channel_usage(covariance)
    return Look(
        label,
        step,
        t,
        found.similarity,
        found.spread,
        found.token_cosine,
        found.mean_cosine,
        {name: float(value) for name, value in similarity.diversity(jnp.asarray(found.similarity)).items()},
        np.asarray(similarity.effective_rank(covariance)),
        np.asarray(similarity.participation_ratio(covariance)),
        np.asarray(jnp.sort(usage, axis=1)[:, ::-1]),
        np.asarray(similarity.channels_used(usage)),
        found.norm,
        dict(known),
    )


def estimators(found: Measured, chosen: Estimator) -> dict[str, Float[np.ndarray, "l l"]]:
    """The blocks compared in other ways, by name."""
    rows = list(jnp.asarray(found.rows["pooled"]))
    return compared(found, chosen) | {"Procrustes": np.asarray(similarity.procrustes(rows))}


def compared(found: Measured, chosen: Estimator) -> dict[str, Float[np.ndarray, "l l"]]:
    """By every kernel and kind of example, and by CKNNA."""
    others = {}
    for unit in ("pooled", "token"):
        for kernel in similarity.KERNELS:
            one = chosen._replace(unit=unit, kernel=kernel, hsic="unbiased")
            others[f"{kernel}, {unit}"] = measure.similar(one, found.rows[unit])
    for kernel in similarity.KERNELS:
        others[f"{kernel}, image"] = found.minibatch["image", kernel]
    biased = chosen._replace(unit="pooled", kernel="linear", hsic="biased")
    others["linear, pooled, biased"] = measure.similar(biased, found.rows["pooled"])
    units = [row / np.linalg.norm(row, axis=1, keepdims=True) for row in found.rows["pooled"]]
    if len(units[0]) > NEAREST:
        others[f"CKNNA, {NEAREST} nearest"] = np.asarray(_cknna(list(map(jnp.asarray, units))))
    return others


@jax.jit
def _cknna(units: list[Array]) -> Array:
    return similarity.cknna(units, NEAREST)
