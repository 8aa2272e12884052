"""How alike the blocks are during training: the summary of `analyze`, from a few held-out images, and a heatmap."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import jax.numpy as jnp

from diversedit_jax import config as configs
from diversedit_jax.analysis import drawing, measure
from diversedit_jax.analysis import subject as subjects
from diversedit_jax.analysis.measure import Estimator, Settings
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluators import Current
from diversedit_jax.metrics import similarity
from diversedit_jax.sampling.sampler import Drawn


def make(
    drawn: Drawn,
    *,
    num: int = 256,
    batch: int = 32,
    time: float = 0.05,
    unit: str = "pooled",
    kernel: str = "linear",
    hsic: str = "unbiased",
    split: str | None = None,
) -> Callable[[Current], Iterable[tuple[str, Any]]]:
    """The evaluator: `run(current)` compares all blocks of the EMA network on `num` images at one time.

    It yields `diversity_all`, `diversity_adjacent`, `diversity_mirrored`, `diversity_distant` (see
    `similarity.diversity`), `effective_rank`, a mean over blocks, and `heatmap`, an image.

    time: 0 is data, 1 is noise. unit, kernel, hsic: see `analysis.measure.Estimator`. split: by default `test`, where
    the data have one. Takes a forward pass of `num` images and no samples.
    """
    if not 0 <= time <= 1:
        raise ConfigError(f"similarity: time = {time}: t is in [0, 1], 0 is data, 1 is noise")
    settings = Settings(Estimator(unit, kernel, hsic), num, batch)
    measure.check(settings)

    @cache  # read and compiled at the first run, once
    def looking() -> tuple[measure.Pass, list]:
        reads_tokens = drawn.config.objective.name == "reg"
        config = configs.copied(drawn.config) if reads_tokens else subjects.without_encoders(drawn.config)
        if "vae" in config.codec:
            config.codec.vae = None  # nothing is decoded
        subject = subjects.of_config(config, drawn.latents, drawn.num_classes)
        chosen = settings._replace(split=measure.split_of(subject, split))
        return measure.compiled(subject, chosen), measure.batches(subject.data(chosen.split), chosen, subject.layout)

    def run(current: Current) -> Iterable[tuple[str, Any]]:
        ready, shown = looking()
        found = measure.measure(ready, current.params, shown, time)
        for name, value in similarity.diversity(jnp.asarray(found.similarity)).items():
            yield f"diversity_{name}", float(value)
        yield "effective_rank", float(similarity.effective_rank(jnp.asarray(found.covariance)).mean())
        yield "heatmap", drawing.rendered(found.similarity, "CKA")

    return run
