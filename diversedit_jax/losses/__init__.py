"""Auxiliary losses on the features of a network's blocks, one published loss per file. They need jax alone."""

from functools import partial

from diversedit_jax import registry

# make(name, **options): the auxiliary loss `name`; the options are the keywords of `losses.<name>.make`.
make = partial(registry.make, "losses")
