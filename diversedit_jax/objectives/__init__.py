"""What a network regresses, one objective per file."""

from diversedit_jax import registry


def make(name: str, num_classes: int, **options):
    """The objective `name`; the options are the keywords of `objectives.<name>.make`."""
    return registry.make("objectives", name, num_classes, **options)
