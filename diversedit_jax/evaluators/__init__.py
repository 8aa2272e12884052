"""Evaluators, each a function that scores samples of a run, at its own interval."""

from diversedit_jax import slots


def make(name: str, **options):
    """The evaluator `name`; the options are the keywords of `evaluators.<name>.make`."""
    return slots.make("evaluators", name, **options)
