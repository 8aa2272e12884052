"""Evaluators: functions that judge a run while it trains, each at its own interval.

A factory takes a `SampleSpec` and returns `run(current) -> (name, value) pairs`, see `Current`. A value is a number, or
an image, uint8 [h w c]. The trainer logs it as LABEL/name, with the label of the evaluator in the config.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from diversedit_jax import registry, sharding
from diversedit_jax.api import Condition
from diversedit_jax.data import Dataset
from diversedit_jax.errors import ConfigError
from diversedit_jax.runs.build import Experiment, open_data, sample_shape

Source = TypeVar("Source")


class SampleSpec(NamedTuple):
    """The samples of a run, and the run itself.

    shape:      of an image; None if samples are latents. batch: images that are drawn at a time.
    conditions: (rule of `conditioning.RULES` or None, num, seed) -> stored conditions of `num` samples.
    experiment: the components of the run, for evaluators that look at the network. data: split -> data set.
    """

    shape: tuple[int, ...] | None
    batch: int
    conditions: Callable[[str | None, int, int], Condition]
    experiment: Experiment
    data: Callable[[str], Dataset]

    @classmethod
    def of(cls, experiment: Experiment) -> "SampleSpec":
        codec, config = experiment.components.codec, experiment.config
        shape = sample_shape(codec, codec.shape(experiment.space.shape))
        batch = sharding.filled(config.sampler.batch_size)
        return cls(shape, batch, experiment.conditions, experiment, partial(open_data, config))

    def judged(self, name: str, source: type[Source], what: str, shape: tuple[int, ...]) -> Source:
        """The training source of the data `name`, for an evaluator that judges no other. ConfigError for other data.

        source: the class of its sources. what, shape: its samples in a word, and the shape of one.
        """
        if self.shape != shape:
            raise ConfigError(f"{name}: the samples are {self.shape or 'latents'}, wanted {what} {shape}")
        train = self.data("train").source
        if not isinstance(train, source):
            raise ConfigError(f"{name}: the run has other data: it judges config.data.name = {name!r}")
        return train


class Current(NamedTuple):
    """A run at this step. current(conditions [n], first=0) draws the images number first .. first + n - 1.

    learned: `params`, the EMA that images are drawn from, and `losses`, `objective` and `memory` of the state.
    frozen:  weights of the codec.
    """

    learned: dict[str, Any]
    frozen: Any
    draw: Callable[..., np.ndarray]

    def __call__(self, conditions: Condition, first: int = 0) -> np.ndarray:
        return self.draw(conditions, first=first)


# make(name, spec, **options): the evaluator `name`; options: the keywords of `evaluators.<name>.make`.
make = partial(registry.make, "evaluators")
