"""Evaluators, each a function that judges a run as it is, at its own interval.

A factory takes what the samples are and gives `run(current) -> (name, value) pairs`: see `Current`. A value is a number
or an image, uint8 [h w c]. The trainer writes it as LABEL/name, with the evaluator's label in the config.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diversedit_jax import registry
from diversedit_jax.api import Params
from diversedit_jax.sampling.sampler import Drawn


class Current(NamedTuple):
    """A run at this step. current(labels [n], first=0) draws the images number first .. first + n - 1, uint8 [n h w c].

    params: the EMA, which they are drawn from.
    """

    params: Params
    draw: Callable[..., np.ndarray]

    def __call__(self, labels: np.ndarray, first: int = 0) -> np.ndarray:
        return self.draw(labels, first=first)


def make(name: str, drawn: Drawn, **options):
    """The evaluator `name`; the options are the keywords of `evaluators.<name>.make`."""
    return registry.make("evaluators", name, drawn, **options)
