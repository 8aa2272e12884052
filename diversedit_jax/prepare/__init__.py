"""From stored data to the network's space and back, on device, one way per file."""

from diversedit_jax import slots


def make(name: str, **options):
    """The preparation `name` as a `Prepare`; the options are the keywords of `prepare.<name>.make`."""
    return slots.make("prepare", name, **options)
