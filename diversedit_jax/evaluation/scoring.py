"""Scores of images against a reference: one pass of feature networks, then every score from the same features.

Of Inception's features: `fid`, `sfid`, `inception_score`, `precision`, `recall`, `kid`. Those of another network bear
its name: `fd_dinov2`, `precision_dinov2`, .... All images are seen once, in batches of one compiled size, split over
all devices; moments are summed in float64 on the host, so that nothing but features stays in memory.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diversedit_jax import sharding
from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError, DataError, NonFiniteError
from diversedit_jax.evaluation.extractors import Extractor, Features
from diversedit_jax.evaluation.image_files import SampleFiles
from diversedit_jax.evaluation.reference_statistics import Reference, Statistics
from diversedit_jax.metrics.frechet import Moments, frechet_distance, merged, moments
from diversedit_jax.metrics.inception_score import inception_score, probabilities
from diversedit_jax.metrics.kernel_distance import kernel_distance
from diversedit_jax.metrics.precision_recall import precision_recall

SPLIT, NEAREST, SUBSETS, SUBSET_SIZE = 5_000, 3, 100, 1_000
MOST_IMAGES = 100_000  # of a reference, all of whose features are held at once
Found = dict[str, Features]  # extractor's name -> features of a batch, on the host
Extract = Callable[[np.ndarray], Found]


def extraction(extractors: Iterable[Extractor], layout: sharding.Layout, batch: int) -> Extract:
    """A function from uint8 images [b h w c], b at most `batch`, to the features that each extractor gives.

    Batches are filled up to one size, so that one program serves a whole evaluation, and each network takes its own
    number of images at a time on each device: no feature depends on the batch or on the number of devices.
    """
    extractors = list(extractors)
    least = math.lcm(*(one.chunk for one in extractors)) * layout.mesh.size
    size = -(-batch // least) * least

    @functools.partial(jax.jit, out_shardings=sharding.replicated(layout))  # so that every process can read the result
    def run(weights: list[Any], images: jax.Array) -> dict[str, Features]:
        return {
            one.name: sharding.in_chunks(functools.partial(one.apply, w), images, one.chunk, layout.mesh.size)
            for one, w in zip(extractors, weights, strict=True)
        }

    @functools.cache
    def weights() -> list[Any]:
        return [sharding.put(one.init(), sharding.replicated(layout)) for one in extractors]

    def extract(images: np.ndarray) -> Found:
        if not 0 < len(images) <= size:
            raise ValueError(f"wanted 1 to {size} images at a time, given {len(images)}")
        filled = np.resize(images, (size, *images.shape[1:]))
        found = jax.device_get(run(weights(), sharding.put(filled, sharding.over_batch(layout))))
        found = jax.tree.map(lambda x: np.asarray(x[: len(images)], np.float32), found)
        for name, features in found.items():
            if not all(np.isfinite(x).all() for x in features if x is not None):
                raise NonFiniteError(f"the features of {name} are not finite: its weights, or the images, are damaged")
        return found

    return extract


def features_of(extractors: Iterable[Extractor], shape: tuple[int, int, int]) -> dict[str, Features]:
    """The shapes of what each extractor gives of one image (h, w, c); ConfigError if it cannot take it."""
    image = jax.ShapeDtypeStruct((1, *shape), np.uint8)
    return {one.name: jax.eval_shape(one.apply, _abstract(one.init()), image) for one in extractors}


def _abstract(weights: Params) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)


def check_reference(
    extractors: Iterable[Extractor], references: Iterable[Reference], shape: tuple[int, int, int]
) -> None:
    """Raise ConfigError for references that are none for these networks, or for images of another size."""
    extractors, references = list(extractors), list(references)
    features = features_of(extractors, shape)
    for one in extractors:
        given = [reference for reference in references if one.name in reference.by_network]
        with_images = [reference for reference in references if reference.images is not None]
        if len(given) > 1:
            raise ConfigError(f"two references have statistics of {one.name}: give one of them")
        if given:
            _check_statistics(one, given[0], features[one.name])
        elif len(with_images) > 1:
            names = " and ".join(str(reference.about["name"]) for reference in with_images)
            raise ConfigError(f"{names} have images, and none has statistics of {one.name}: give one of them")
        elif not with_images and (references or one.reference is None):
            known = sorted({name for reference in references for name in reference.by_network})
            others = f", but of {', '.join(known)}" if known else ": give one with --reference=FILE"
            raise ConfigError(f"no reference has statistics of {one.name}{others}")
    for reference in references:
        if reference.images is not None and reference.images.count > MOST_IMAGES:
            raise ConfigError(
                f"the reference has {reference.images.count} images, more than {MOST_IMAGES}: "
                "make statistics of them once, with tools.reference_stats"
            )
        if reference.images is not None and reference.images.shape != shape:
            theirs, ours = (f"{h} x {w} pixels and {c} channels" for h, w, c in (reference.images.shape, shape))
            raise ConfigError(f"samples have {ours}, the reference's images {theirs}")
        made = reference.about.get("made", {}).get("size")
        if made is not None and tuple(made) != shape[:2]:
            theirs, ours = (f"{h} x {w} pixels" for h, w in (made, shape[:2]))
            raise ConfigError(f"samples have {ours}, the reference is of {theirs}")


def _check_statistics(one: Extractor, reference: Reference, features: Features) -> None:
    """Raise ConfigError for statistics of another network than this, or of another resizing before it."""
    statistics = reference.by_network[one.name]
    for kind in ("pool", "spatial"):
        theirs, ours = getattr(statistics, kind), getattr(features, kind)
        if theirs is not None and ours is not None and len(theirs[0]) != ours.shape[1]:
            raise ConfigError(f"the reference has {len(theirs[0])} {kind} features, {one.name} has {ours.shape[1]}")
    given, wanted = statistics.digest, one.about.get("weights", {}).get("digest")
    if None not in (given, wanted) and given != wanted:
        raise ConfigError(f"the reference was made with other weights of {one.name}: {given[:12]}, given {wanted[:12]}")
    made = reference.about.get("made", {}).get("extractors", {}).get(one.name, {})
    theirs, ours = made.get("resize"), one.about.get("resize")
    if None not in (theirs, ours) and theirs != ours:
        raise ConfigError(f"the reference was made with images resized for {one.name} {theirs}, given {ours}")


def check_images(what: str, shape: tuple[int, ...] | None) -> None:
    """Raise ConfigError for samples that cannot be judged. shape: of a decoded sample, None for latents."""
    if shape is None:
        raise ConfigError(
            f"{what} samples latents, and images are judged: give their decoder (config.codec.vae or --vae=FILE)"
        )
    if len(shape) != 3:
        raise ConfigError(f"{what} has samples of shape {shape}, and images [h w c] are judged")


def check_count(num: int, features: Mapping[str, Features], few: bool) -> None:
    """Raise ConfigError for fewer samples than a covariance of full rank needs; with `few`, than any covariance.

    features: their shapes, see `features_of`.
    """
    dimensions = {name: found.pool.shape[1] for name, found in features.items()}
    most = max(dimensions, key=dimensions.__getitem__)
    wanted = 2 if few else dimensions[most] + 1
    if num < wanted:
        more = "" if few else ", or allow it with few=True, for numbers that compare with nothing (--few)"
        raise ConfigError(
            f"{num} samples are too few for the covariance of the {dimensions[most]} features of {most}: "
            f"give at least {wanted}{more}"
        )


class Totals(NamedTuple):
    """Moments of all features so far."""

    pool: Moments | None = None
    spatial: Moments | None = None

    def plus(self, part: Features) -> "Totals":
        """The moments with those of another part."""

        def added(before: Moments | None, features: np.ndarray) -> Moments:
            return moments(features) if before is None else merged(before, moments(features))

        return Totals(added(self.pool, part.pool), None if part.spatial is None else added(self.spatial, part.spatial))


def statistics_of(name: str, parts: Iterable[Features]) -> Statistics:
    """Statistics of a set from the features of its parts, one after the other."""
    return _statistics_of([name], ({name: part} for part in parts))[name]


def _statistics_of(names: Iterable[str], parts: Iterable[Found]) -> dict[str, Statistics]:
    """The same of several networks at once, so that of each part only pool features are kept."""
    totals = {name: Totals() for name in names}
    kept: dict[str, list[np.ndarray]] = {name: [] for name in totals}
    for part in gathered(parts):
        for name in totals:
            totals[name] = totals[name].plus(part[name])
            kept[name].append(part[name].pool)
    found = {}
    for name, total in totals.items():
        if total.pool is None or total.pool.count < 2:
            raise DataError(f"{name}: statistics need at least two images")
        gaussians = [None if m is None else m.gaussian for m in total]
        found[name] = Statistics(*gaussians, np.concatenate(kept[name]))
    return found


def gathered(parts: Iterable[Found], least: int = 2_048) -> Iterator[Found]:
    """Consecutive parts joined until they have `least` images: moments of larger parts take half the time."""
    waiting: list[Found] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(next(iter(part.values())).pool)
        if count >= least:
            yield jax.tree.map(lambda *x: np.concatenate(x), *waiting)
            waiting, count = [], 0
    if waiting:
        yield jax.tree.map(lambda *x: np.concatenate(x), *waiting)


def references_for(
    extractors: Iterable[Extractor], references: Iterable[Reference], extract: Extract, batch: int
) -> dict[str, Statistics]:
    """The statistics to compare with, by extractor.

    What the files lack is computed from the images in them, or from those that come with an extractor: all statistics,
    or of a file of ADM the features of its images, which precision, recall and kernel distance need.
    """
    extractors, references = list(extractors), list(references)
    found = {name: stats for reference in references for name, stats in reference.by_network.items()}
    lacking = [one.name for one in extractors if one.name not in found or found[one.name].features is None]
    for source in (reference.images for reference in references if reference.images is not None):
        names = [name for name in lacking if _images_of(name, references) is source]
        parts = (extract(part) for part in in_batches(source, batch)) if names else ()
        for name, made in _statistics_of(names, parts).items():
            found[name] = found[name]._replace(features=made.features) if name in found else made
    for one in extractors:
        if one.name not in found:
            own = one.reference()
            parts = (extract(own[i : i + batch]) for i in range(0, len(own), batch))
            found |= _statistics_of([one.name], parts)
    return {one.name: found[one.name] for one in extractors}


def _images_of(name: str, references: Iterable[Reference]) -> SampleFiles | None:
    """The images of the reference with this network's statistics; without any, those of another reference."""
    with_images = [reference for reference in references if reference.images is not None]
    own = [reference.images for reference in with_images if name in reference.by_network]
    return next(iter([*own, *(reference.images for reference in with_images)]), None)


def in_batches(images: SampleFiles, batch: int) -> Iterator[np.ndarray]:
    """All images of a file, in order."""
    for first in range(0, images.count, batch):
        yield images.read(first, min(batch, images.count - first))


def scores(name: str, parts: Iterable[Features], reference: Statistics) -> dict[str, float]:
    """Every score that these features and this reference allow, by name.

    Frechet distances are in float64; precision and recall in exact float32 and, `_float16`, as ADM's evaluator rounds
    (see `metrics.precision_recall`).
    """
    logits = []

    def seen() -> Iterator[Features]:
        for part in parts:
            if part.logits is not None:
                logits.append(part.logits)
            yield part

    ours = statistics_of(name, seen())
    kinds = {"fid" if name == "inception" else f"fd_{name}": "pool"}
    kinds |= {"sfid" if name == "inception" else f"sfd_{name}": "spatial"}
    end = "" if name == "inception" else f"_{name}"
    found = {}
    for score, kind in kinds.items():
        mine, theirs = getattr(ours, kind), getattr(reference, kind)
        if mine is not None and theirs is not None:
            found[score] = frechet_distance(*mine, *theirs)
    if logits:
        found[f"inception_score{end}"], found[f"inception_score{end}_std"] = inception_score(
            probabilities(np.concatenate(logits)), SPLIT
        )
    if reference.features is not None and min(len(reference.features), len(ours.features)) > NEAREST:
        for distances, mark in (("exact", ""), ("float16", "_float16")):
            both = precision_recall(reference.features, ours.features, k=NEAREST, distances=distances)
            found[f"precision{mark}{end}"], found[f"recall{mark}{end}"] = both
        size = min(SUBSET_SIZE, len(reference.features), len(ours.features))
        kid = "kid" if name == "inception" else f"kd_{name}"
        found[kid], found[f"{kid}_std"] = kernel_distance(
            reference.features, ours.features, subsets=SUBSETS, subset_size=size
        )
    return {key: float(value) for key, value in found.items()}
