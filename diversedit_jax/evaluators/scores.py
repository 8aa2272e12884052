"""FID and its companions during training: the scores of `evaluate`, from fewer samples and without files."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import jax
import numpy as np

from diversedit_jax import conditioning, sharding
from diversedit_jax.api import Condition
from diversedit_jax.evaluation import extractors, scoring
from diversedit_jax.evaluation.extractors import Features
from diversedit_jax.evaluation.reference_statistics import Statistics, open_reference
from diversedit_jax.evaluators import Current, SampleSpec
from diversedit_jax.registry import MANY, in_range, one_of


def make(
    spec: SampleSpec,
    *,
    extractor: str = "inception",
    file: str | None = None,
    reference: str | None = None,
    num: int = 10_000,
    labels: str | None = None,
    few: bool = False,
) -> Callable[[Current], Iterable[tuple[str, float]]]:
    """The evaluator: `run(current)` draws `num` images and yields every score of `scoring.scores`.

    extractor, file: the feature network and its weights.
    reference: a file of `reference_statistics.open_reference`. None: the images that come with the extractor; for
        `clip` no comparison.
    num: of samples.
    labels: a rule of `conditioning.RULES`. few: allow fewer images than features.

    Wrong options raise ConfigError now, not at the first evaluation.
    """
    one_of("scores: labels", labels, (None, *conditioning.RULES))
    in_range("scores: num", num, 2, MANY)
    scoring.check_images("scores: the run", spec.shape)
    one = extractors.make(extractor, **({} if file is None else {"file": file}))
    references = [] if reference is None else [open_reference(reference)]
    null = jax.tree.map(lambda leaf: np.asarray(leaf)[None], spec.experiment.space.conditions.null)
    compared = scoring.compared([one], references, spec.shape, num, few, null)

    @cache  # compile and read conditions once, at the first run
    def judge() -> tuple[scoring.Extract, Statistics | None, Condition]:
        extract = scoring.extraction([one], sharding.make(), spec.batch)
        statistics = scoring.references_for(compared, references, extract, spec.batch).get(one.name)
        return extract, statistics, spec.conditions(labels, num, 0)

    def run(current: Current) -> Iterable[tuple[str, float]]:
        extract, statistics, conditions = judge()

        def parts() -> Iterator[Features]:
            for first in range(0, num, spec.batch):
                y = conditioning.taken(conditions, first, spec.batch)
                images = current(y, first=first)[: num - first]
                yield extract(images, conditioning.taken(y, 0, len(images)))[one.name]

        yield from scoring.scores(one.name, parts(), statistics).items()

    return run
