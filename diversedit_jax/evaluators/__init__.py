"""Evaluators, each a function that scores samples of a run, at its own interval.

A factory takes what the samples are and gives `run(sample) -> (name, value) pairs`, where sample(labels [n], first=0)
draws the images number first .. first + n - 1, uint8 [n h w c]. The trainer writes the values as LABEL/name, with the
evaluator's label in the config.
"""

from diversedit_jax import slots
from diversedit_jax.sampling import Drawn


def make(name: str, drawn: Drawn, **options):
    """The evaluator `name`; the options are the keywords of `evaluators.<name>.make`."""
    return slots.make("evaluators", name, drawn, **options)
