"""Auxiliary losses on the features of a network's blocks, one published loss per file: jax only."""

from diversedit_jax import registry


def make(name: str, **options):
    """The auxiliary loss `name` as an `AuxLoss`; the options are the keywords of `losses.<name>.make`."""
    return registry.make("losses", name, **options)
