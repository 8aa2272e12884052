"""What all networks share."""

import jax
import numpy as np
from flax import nnx

from diversedit_jax import models


def test_keys_are_those_of_flax():
    key = jax.random.key(7)
    ours, flax = models.Keys(key), nnx.Rngs(key)
    for _ in range(3):
        np.testing.assert_array_equal(jax.random.key_data(ours.params()), jax.random.key_data(flax.params()))


def test_initial_values_are_those_of_flax():
    def build(rngs):
        return nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs), nnx.Embed(2, 4, rngs=rngs)])

    ours = models.functional(build).init(jax.random.key(3))
    theirs = nnx.to_pure_dict(nnx.state(build(nnx.Rngs(jax.random.key(3)))))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
