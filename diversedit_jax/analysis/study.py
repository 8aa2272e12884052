"""One subject, looked into: every checkpoint at one time, and the last one closely."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diversedit_jax.analysis import gradient_conflict, known_scores, linear_probes, measure, pca_maps, skip_connections
from diversedit_jax.analysis.gradient_conflict import Pull
from diversedit_jax.analysis.measure import Estimator, Measured, Settings
from diversedit_jax.analysis.pca_maps import Maps
from diversedit_jax.analysis.skip_connections import Connections
from diversedit_jax.analysis.subject import Subject
from diversedit_jax.errors import RunError
from diversedit_jax.metrics import similarity

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
    subject: Subject,
    steps: Sequence[int],
    settings: Settings,
    t: float,
    times: Sequence[float],
    parts: Sequence[str],
    say: Callable[[str], None],
) -> Study:
    """Look into a subject at these steps; `say` gets a line now and then."""
    notes = list(subject.notes)
    dataset = subject.data(settings.split)
    shown = measure.batches(dataset, settings, subject.layout)
    used = len(shown) * len(shown[0]["y"])
    ready, known = measure.compiled(subject, settings), known_scores.found(subject.workdir)
    looks, last, params = [], None, None
    for step in steps:
        params = last = None  # freed before the next are read
        params = subject.load(step)
        last = measure.measure(ready, params, shown, t)
        looks.append(look(subject.label, step, t, last, known.get(step, {})))
        at = f", step {step}" if subject.workdir else ""
        say(f"{subject.label}{at}: mean CKA of two blocks {1 - looks[-1].diversity['all']:.3f} at t = {t:g}")
    step, found = steps[-1], {}
    at_times = []
    if "times" in parts:
        for other in times:
            one = last if other == t else measure.measure(ready, params, shown, other)
            at_times.append(look(subject.label, step, other, one, known.get(step, {})))
    if "estimators" in parts:
        found["estimators"] = estimators(last, settings.estimator)
    if "probe" in parts:
        say(f"{subject.label}: linear probes")
        fitted = measure.batches(subject.data("train"), settings._replace(num=2 * settings.num), subject.layout)
        alike = settings.split == "train"
        found["probe"] = linear_probes.accuracies(ready, params, fitted, None if alike else shown, t)
    if "gradients" in parts:
        say(f"{subject.label}: gradients")
        try:
            found["pulls"] = gradient_conflict.pulls(
                subject, params, subject.heads(step), shown[:FEW], step, settings.seed
            )
        except RunError as error:
            notes.append(f"gradients are left out: {error}")
    if "connections" in parts:
        found["connections"] = skip_connections.used(subject, params, shown[:FEW], settings.seed)
    if "maps" in parts:
        found["maps"] = pca_maps.principal(subject, params, shown[0], t, seed=settings.seed)
    about = subject.about | {"steps": list(steps), "images": used, "of": len(dataset.source)}
    return Study(subject.label, looks, at_times, Close(subject.label, step, **found), about, notes)


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
