"""What a network regresses, one objective per file."""

from functools import partial

from diversedit_jax import registry

# make(name, **options): the objective `name`; the options are the keywords of `objectives.<name>.make`.
make = partial(registry.make, "objectives")
