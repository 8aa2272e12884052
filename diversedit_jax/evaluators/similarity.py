"""Similarity of blocks during training: the summary of `analyze` on a few held-out images, and a heatmap."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import jax.numpy as jnp

from diversedit_jax.analysis import drawing, measure, study
from diversedit_jax.analysis.measure import Estimator, Settings
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.evaluators import Current, SampleSpec
from diversedit_jax.metrics import similarity
from diversedit_jax.registry import in_range


def make(
    spec: SampleSpec,
    *,
    num: int = 256,
    batch: int = 32,
    time: float = 0.05,
    unit: str = "pooled",
    kernel: str = "linear",
    hsic: str = "unbiased",
    split: str | None = None,
) -> Callable[[Current], Iterable[tuple[str, Any]]]:
    """The evaluator: `run(current)` compares all blocks of the EMA network at one time. It draws no samples.

    It yields `diversity_NAME` for every NAME of `similarity.diversity` (all, adjacent, mirrored, distant),
    `effective_rank` and `mean_share` (of the mean token in the energy), means over blocks; `centred_cosine`, a mean
    over pairs of blocks; `norm`, the length of a token of the last block; and `heatmap`, an image. Of a network with a
    text stream it also yields `text_diversity_NAME` (all, adjacent, distant) and `image_text_similarity`, a mean over
    pairs of an image's block and a text's.

    num: images. batch: so many in a forward pass. time: 0 is data, 1 is noise.
    unit, kernel, hsic: see `analysis.measure.Estimator`.
    split: by default `test`, if the data have one.

    Wrong options raise ConfigError now, not at the first evaluation.
    """
    in_range("similarity: time", time, 0, 1)
    settings = Settings(Estimator(unit, kernel, hsic), num, batch)
    measure.check(settings)
    settings = settings._replace(split=measure.split_of(spec.data, split))
    try:
        dataset = spec.data(settings.split)
    except RunError as error:
        raise ConfigError(f"split = {settings.split!r}: {error}") from error
    measure.whole_batches(dataset, settings)

    @cache  # compile and read once, at the first run
    def prepared() -> tuple[measure.Pass, list]:
        shown = measure.batches(dataset, settings, spec.experiment.layout)
        return measure.compiled(spec.experiment, settings), shown

    def run(current: Current) -> Iterable[tuple[str, Any]]:
        ready, shown = prepared()
        found = measure.measure(ready, current.learned, current.frozen, shown, time)
        for name, value in similarity.diversity(jnp.asarray(found.similarity)).items():
            yield f"diversity_{name}", float(value)
        yield "effective_rank", float(similarity.effective_rank(jnp.asarray(found.covariance)).mean())
        yield "centred_cosine", float(similarity.off_diagonal_mean(jnp.asarray(found.centred_cosine)))
        yield "mean_share", float(found.mean_share.mean())
        yield "norm", float(found.norm[-1])
        if found.both is not None:
            _, between, text = study.parted(found)
            for name, value in study.text_diversity(text).items():
                yield f"text_diversity_{name}", value
            yield "image_text_similarity", float(between.mean())
        yield "heatmap", drawing.rendered(found.similarity, "CKA")

    return run
