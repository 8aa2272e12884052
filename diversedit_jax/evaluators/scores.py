"""FID and its companions during training: the scores of `evaluate`, of fewer samples and without files."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np

from diversedit_jax import sharding
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation import extractors, scoring
from diversedit_jax.evaluation.extractors import Features
from diversedit_jax.evaluation.reference_statistics import Statistics, open_reference
from diversedit_jax.sampling import sampler
from diversedit_jax.sampling.sampler import Drawn


def make(
    drawn: Drawn,
    *,
    extractor: str = "inception",
    file: str | None = None,
    reference: str | None = None,
    num: int = 10_000,
    labels: str = "balanced",
    few: bool = False,
) -> Callable[[Callable[..., np.ndarray]], Iterable[tuple[str, float]]]:
    """The evaluator: `run(sample)` draws `num` images and yields every score of `scoring.scores`, by its name.

    extractor, file: the feature network and its weights. reference: as `references.open_reference` takes it; None: the
    images that come with the extractor. labels: a rule of `sampling.LABELS`. few: allow fewer images than features.

    All that can be wrong with these is said now, not at the first evaluation.
    """
    if drawn.shape is None:
        raise ConfigError("scores: the samples are latents, and images are judged: set config.codec.vae")
    one = extractors.make(extractor, **({} if file is None else {"file": file}))
    references = [] if reference is None else [open_reference(reference)]
    scoring.check_count(num, scoring.features_of([one], drawn.shape), few)
    scoring.check_reference([one], references, drawn.shape)
    y = sampler.labels_by(labels, -(-num // drawn.batch) * drawn.batch, drawn.num_classes, seed=0)

    @cache  # compiled at the first run, once
    def judge() -> tuple[scoring.Extract, Statistics]:
        extract = scoring.extraction([one], sharding.make(), drawn.batch)
        return extract, scoring.references_for([one], references, extract, drawn.batch)[one.name]

    def run(sample: Callable[..., np.ndarray]) -> Iterable[tuple[str, float]]:
        extract, statistics = judge()

        def parts() -> Iterator[Features]:
            for first in range(0, num, drawn.batch):
                images = sample(y[first : first + drawn.batch], first=first)
                yield extract(images[: num - first])[one.name]

        yield from scoring.scores(one.name, parts(), statistics).items()

    return run
