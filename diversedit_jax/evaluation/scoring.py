"""Scores of images against a reference. Feature networks see every image once; all scores come from their features.

Scores from Inception: `fid`, `sfid`, `inception_score`, `precision`, `recall`, `kid`. Scores from another network have
its name: `fd_dinov2`, `precision_dinov2`, .... `clip_score` needs no reference: it is the mean over images of
100 max(0, cos(image, caption)) (arXiv 2104.08718, without its factor of 2.5). Batches of one compiled size are split
over all devices. The host sums moments in float64 and keeps only features in memory.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diversedit_jax import conditioning, sharding
from diversedit_jax.api import Condition
from diversedit_jax.errors import ConfigError, DataError, NonFiniteError
from diversedit_jax.evaluation.extractors import Extractor, Features
from diversedit_jax.evaluation.image_files import SampleFiles
from diversedit_jax.evaluation.reference_statistics import Reference, Statistics
from diversedit_jax.metrics.frechet import Moments, frechet_distance, merged, moments
from diversedit_jax.metrics.inception_score import inception_score, probabilities
from diversedit_jax.metrics.kernel_distance import kernel_distance
from diversedit_jax.metrics.precision_recall import precision_recall

SPLIT, NEAREST, SUBSETS, SUBSET_SIZE = 5_000, 3, 100, 1_000
MOST_IMAGES = 100_000  # of a reference; all their features are in memory at once
ExtractedFeatures = dict[str, Features]  # name of the extractor -> features of a batch, on the host
Extract = Callable[..., ExtractedFeatures]  # (images, their conditions=None) -> features, see `extraction`


def extraction(extractors: Iterable[Extractor], layout: sharding.Layout, batch: int) -> Extract:
    """A function from uint8 samples [b *s c], b at most `batch`, to the features of each extractor.

    It may also get the stored conditions y [b ...] of the images, for extractors with `match`.
    Every batch is padded to one size, so one compiled program serves a whole evaluation. A device always takes
    `Extractor.chunk` images at a time, so no feature depends on the batch or on the number of devices.
    """
    extractors = list(extractors)
    least = math.lcm(*(one.chunk for one in extractors)) * layout.mesh.size
    size = -(-batch // least) * least

    @functools.partial(jax.jit, out_shardings=sharding.replicated(layout))  # so that every process can read the result
    def run(weights: list[Any], images: jax.Array, y: Condition) -> dict[str, Features]:
        def features(one: Extractor, w: Any) -> Features:
            if one.match is None or y is None:
                return sharding.in_chunks(functools.partial(one.apply, w), images, one.chunk, layout.mesh.size)
            return sharding.in_chunks(functools.partial(matched, one, w), (images, y), one.chunk, layout.mesh.size)

        return {one.name: features(one, w) for one, w in zip(extractors, weights, strict=True)}

    @functools.cache
    def weights() -> list[Any]:
        return [sharding.put(one.init(), sharding.replicated(layout)) for one in extractors]

    def extract(images: np.ndarray, y: Condition = None) -> ExtractedFeatures:
        if not 0 < len(images) <= size:
            raise ValueError(f"wanted 1 to {size} images at a time, given {len(images)}")
        y = None if all(one.match is None for one in extractors) else y
        filled = conditioning.taken((images, y), 0, size)
        extracted = jax.device_get(run(weights(), *sharding.put(filled, sharding.over_batch(layout))))
        extracted = jax.tree.map(lambda x: np.asarray(x[: len(images)], np.float32), extracted)
        for name, features in extracted.items():
            if not all(np.isfinite(x).all() for x in features if x is not None):
                raise NonFiniteError(f"the features of {name} are not finite: its weights or the images are damaged")
        return extracted

    return extract


def matched(one: Extractor, weights: Any, given: tuple[jax.Array, Condition]) -> Features:
    """The features of images, with how well each matches its condition. given: images and conditions."""
    images, y = given
    features = one.apply(weights, images)
    return features._replace(match=one.match(weights, features, y))


def compared(
    extractors: Iterable[Extractor],
    references: Iterable[Reference],
    shape: tuple[int, ...],
    num: int,
    few: bool = False,
    y: Condition = None,
) -> list[Extractor]:
    """The extractors whose features are compared with references. ConfigError for what cannot be scored.

    An extractor with `match` needs no reference: without one it gives the score of its matches alone.

    shape: of an image. num: of samples. few: see `check_count`. y: conditions of the images; None: unknown.
    """
    extractors, references = list(extractors), list(references)
    features = features_of(extractors, shape)
    alone = []
    for one in extractors:
        if one.match is not None and y is not None:
            one.check(y)
            given = any(one.name in reference.by_network or reference.images is not None for reference in references)
            alone += [] if given or one.reference is not None else [one.name]
    found = [one for one in extractors if one.name not in alone]
    if found:
        check_count(num, {one.name: features[one.name] for one in found}, few)
    check_reference(found, references, shape)
    return found


def features_of(extractors: Iterable[Extractor], shape: tuple[int, ...]) -> dict[str, Features]:
    """The shapes of the features of one sample [*s c]. ConfigError if an extractor does not take such samples."""
    image = jax.ShapeDtypeStruct((1, *shape), np.uint8)
    return {one.name: jax.eval_shape(one.apply, one.init(), image) for one in extractors}


def check_reference(extractors: Iterable[Extractor], references: Iterable[Reference], shape: tuple[int, ...]) -> None:
    """Raise ConfigError for references that do not fit these networks, or samples [*s c] of this shape."""
    extractors, references = list(extractors), list(references)
    features = features_of(extractors, shape)
    with_images = [reference for reference in references if reference.images is not None]
    for one in extractors:
        given = [reference for reference in references if one.name in reference.by_network]
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
        images, made = reference.images, reference.about.get("made", {}).get("size")
        if images is not None and images.count > MOST_IMAGES:
            many = f"the reference has {images.count} images, more than {MOST_IMAGES}"
            raise ConfigError(f"{many}: make statistics of them once, with tools.reference_stats")
        if images is not None and images.shape != shape:
            theirs, ours = (f"{' x '.join(map(str, s))} pixels and {c} channels" for *s, c in (images.shape, shape))
            raise ConfigError(f"samples have {ours}, the reference's images {theirs}")
        if made is not None and tuple(made) != shape[:-1]:
            theirs, ours = (f"{' x '.join(map(str, sides))} pixels" for sides in (made, shape[:-1]))
            raise ConfigError(f"samples have {ours}, the reference is of {theirs}")


def _check_statistics(one: Extractor, reference: Reference, features: Features) -> None:
    """Raise ConfigError for statistics of another network, or of another resizing before it."""
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
    """Raise ConfigError for samples that are latents. shape: of a decoded sample, None for latents."""
    if shape is None:
        raise ConfigError(f"{what} samples latents, wanted images: give the decoder (config.codec.vae or --vae=FILE)")


def check_count(num: int, features: Mapping[str, Features], few: bool) -> None:
    """Raise ConfigError for too few samples for a covariance of full rank (few: for any). features: `features_of`."""
    most, dimension = max(((name, one.pool.shape[1]) for name, one in features.items()), key=lambda pair: pair[1])
    wanted = 2 if few else dimension + 1
    if num < wanted:
        more = "" if few else ", or allow it with few=True (--few); such scores compare with no others"
        few_for = f"{num} samples are too few for the covariance of the {dimension} features of {most}"
        raise ConfigError(f"{few_for}: give at least {wanted}{more}")


class Totals(NamedTuple):
    """Moments of all features so far."""

    pool: Moments | None = None
    spatial: Moments | None = None

    def plus(self, part: Features) -> "Totals":
        """Add another part."""

        def added(before: Moments | None, features: np.ndarray | None) -> Moments | None:
            if features is None:
                return None
            return moments(features) if before is None else merged(before, moments(features))

        return Totals(added(self.pool, part.pool), added(self.spatial, part.spatial))


def statistics_of(name: str, parts: Iterable[Features]) -> Statistics:
    """Statistics of a set of images from the features of its parts."""
    return _statistics_of([name], ({name: part} for part in parts))[name]


def _statistics_of(names: Iterable[str], parts: Iterable[ExtractedFeatures]) -> dict[str, Statistics]:
    """The same for several networks at once. Only pool features are kept."""
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


def gathered(parts: Iterable[ExtractedFeatures], least: int = 2_048) -> Iterator[ExtractedFeatures]:
    """Join consecutive parts to at least `least` images. Moments of larger parts take half the time."""
    waiting: list[ExtractedFeatures] = []
    for part in parts:
        waiting.append(part)
        if sum(len(next(iter(one.values())).pool) for one in waiting) >= least:
            yield jax.tree.map(lambda *x: np.concatenate(x), *waiting)
            waiting = []
    if waiting:
        yield jax.tree.map(lambda *x: np.concatenate(x), *waiting)


def references_for(
    extractors: Iterable[Extractor], references: Iterable[Reference], extract: Extract, batch: int
) -> dict[str, Statistics]:
    """The statistics to compare with, by extractor.

    What the files lack is computed from the images in them, or from the images that come with an extractor.
    """
    extractors, references = list(extractors), list(references)
    found = {name: stats for reference in references for name, stats in reference.by_network.items()}
    lacking = [one.name for one in extractors if one.name not in found or found[one.name].features is None]
    for source in (reference.images for reference in references if reference.images is not None):
        names = [name for name in lacking if _images_of(name, references) is source]
        parts = (extract(source.read(i, batch)) for i in range(0, source.count, batch)) if names else ()
        for name, made in _statistics_of(names, parts).items():
            found[name] = found[name]._replace(features=made.features) if name in found else made
    for one in extractors:
        if one.name not in found:
            own = one.reference()
            found |= _statistics_of([one.name], (extract(own[i : i + batch]) for i in range(0, len(own), batch)))
    return {one.name: found[one.name] for one in extractors}


def _images_of(name: str, references: Iterable[Reference]) -> SampleFiles | None:
    """The images of the reference with this network's statistics; otherwise the images of another reference."""
    with_images = [reference for reference in references if reference.images is not None]
    own = [reference.images for reference in with_images if name in reference.by_network]
    return next(iter([*own, *(reference.images for reference in with_images)]), None)


def scores(name: str, parts: Iterable[Features], reference: Statistics | None) -> dict[str, float]:
    """Every score that these features and this reference allow, by name.

    reference: None: compare with nothing, and only score how images match their conditions.
    """
    matches = []

    def seen() -> Iterator[Features]:
        for part in parts:
            if part.match is not None:
                matches.append(part.match)
            yield part

    found = {}
    if reference is None:
        collections.deque(seen(), maxlen=0)
    else:
        found = _against(name, seen(), reference)
    if matches:
        found[f"{name}_score"] = float(np.concatenate(matches).mean(dtype=np.float64))
    return found


def _against(name: str, parts: Iterable[Features], reference: Statistics) -> dict[str, float]:
    """The scores that compare with a reference.

    Frechet distances are in float64. Precision and recall are in exact float32 and, with `_float16`, rounded as by
    ADM's evaluator (see `metrics.precision_recall`).
    """
    logits = []

    def seen() -> Iterator[Features]:
        for part in parts:
            if part.logits is not None:
                logits.append(part.logits)
            yield part

    ours = statistics_of(name, seen())
    fid, sfid, kid, end = ("fid", "sfid", "kid", "")
    if name != "inception":
        fid, sfid, kid, end = f"fd_{name}", f"sfd_{name}", f"kd_{name}", f"_{name}"
    found = {fid: frechet_distance(*ours.pool, *reference.pool)}
    if ours.spatial is not None and reference.spatial is not None:
        found[sfid] = frechet_distance(*ours.spatial, *reference.spatial)
    if logits:
        mean, std = inception_score(probabilities(np.concatenate(logits)), SPLIT)
        found |= {f"inception_score{end}": mean, f"inception_score{end}_std": std}
    if reference.features is not None and min(len(reference.features), len(ours.features)) > NEAREST:
        for distances, mark in (("exact", ""), ("float16", "_float16")):
            both = precision_recall(reference.features, ours.features, k=NEAREST, distances=distances)
            found[f"precision{mark}{end}"], found[f"recall{mark}{end}"] = both
        size = min(SUBSET_SIZE, len(reference.features), len(ours.features))
        mean, std = kernel_distance(reference.features, ours.features, subsets=SUBSETS, subset_size=size)
        found |= {kid: mean, f"{kid}_std": std}
    return {key: float(value) for key, value in found.items()}
