"""FID and its companions during training: the scores of `evaluate`, from fewer samples and without files."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import jax

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
    reference: a file of `reference_statistics.open_reference`. None: the images that come with the extractor.
    num: of samples.
    labels: a rule of `conditioning.RULES`. few: allow fewer images than features.

    Wrong options raise ConfigError now, not at the first evaluation.
    """
    one_of("scores: labels", labels, (None, *conditioning.RULES))
    in_range("scores: num", num, 2, MANY)
    scoring.check_images("scores: the run", spec.shape)
    one = extractors.make(extractor, **({} if file is None else {"file": file}))
    references = [] if reference is None else [open_reference(reference)]
    scoring.check_count(num, scoring.features_of([one], spec.shape), few)
    scoring.check_reference([one], references, spec.shape)
    drawn = -(-num // spec.batch) * spec.batch

    @cache  # compile and read conditions once, at the first run
    def judge() -> tuple[scoring.Extract, Statistics, Condition]:
        extract = scoring.extraction([one], sharding.make(), spec.batch)
        statistics = scoring.references_for([one], references, extract, spec.batch)[one.name]
        return extract, statistics, spec.conditions(labels, drawn, 0)

    def run(current: Current) -> Iterable[tuple[str, float]]:
        extract, statistics, conditions = judge()

        def parts() -> Iterator[Features]:
            for first in range(0, num, spec.batch):
                batch = jax.tree.map(lambda leaf, first=first: leaf[first : first + spec.batch], conditions)
                images = current(batch, first=first)
                yield extract(images[: num - first])[one.name]

        yield from scoring.scores(one.name, parts(), statistics).items()

    return run
