"""What a codec, an objective or a loss reads and the data do not give is known before anything compiles."""

import jax
import numpy as np
import optax
import pytest

from diversedit_jax import codecs, losses, models, objectives
from diversedit_jax.api import Conditions, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.training.step import Components, initializer

PIXELS, LATENTS = {"x": np.zeros((2, 8, 8, 4), np.float32)}, {"moments": np.zeros((2, 8, 8, 8), np.float32)}


def traced(batch, codec="pixels", objective="flow_matching", **aux):
    space = Space((8, 8, 4), Conditions.labels(3))
    made = objectives.make(objective)
    model = models.make("dit", space, made.inputs, depth=2, width=16, heads=2)
    terms = {label: losses.make(label, **options) for label, options in aux.items()}
    null = space.conditions.null
    parts = Components(model, codecs.make(codec), made, terms, optax.identity(), 0.9, 1, null)
    jax.eval_shape(initializer(parts, batch | {"y": np.zeros(2, np.int32)}), jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch": PIXELS, "codec": "vae"}, "config.codec reads `moments`, but the data give x, y: choose a codec"),
        ({"batch": LATENTS}, "config.codec reads `x`, but the data give moments, y"),
        ({"batch": PIXELS, "objective": "reg"}, "config.objective reads `token/dinov2`, but a batch has image, x, y: "),
        (
            {"batch": PIXELS, "repa": {"block": 1}},
            "config.losses.repa reads `features/dinov2`, but a batch has image, x",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_reader(options, told):
    with pytest.raises(ConfigError, match=f"^{told}"):
        traced(**options)


def test_what_fits_is_traced():
    traced(PIXELS)
    traced(LATENTS, "vae")
