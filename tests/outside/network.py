"""A network of tokens for x of any number of spatial axes and for any condition."""

import jax
import jax.numpy as jnp
import numpy as np

from diversedit_jax.api import Model, Space
from diversedit_jax.diffusion.paths import over


def make(space: Space, inputs, cuts, *, width: int = 8, depth: int = 3, deviation: float = 1.0) -> Model:
    """Residual blocks on one token for each place. The prediction is the data, preconditioned for this deviation."""
    tokens, channels = int(np.prod(space.shape[:-1])), space.shape[-1]
    null = space.conditions.null
    labels = space.conditions.classes is not None
    told = space.conditions.classes + 1 if labels else null["context"].shape[-1]

    def init(key):
        keys = jax.random.split(key, depth + 2)
        block = {"in": (width, 2 * width), "out": (2 * width, width)}
        return {
            "embed": {
                "x": 0.1 * jax.random.normal(keys[-1], (channels, width)),
                "y": jnp.zeros((told, tokens, width)),
            },
            "blocks": [
                {
                    name: 0.1 * jax.random.normal(jax.random.fold_in(k, i), s)
                    for i, (name, s) in enumerate(block.items())
                }
                for k in keys[:depth]
            ],
            "head": 0.3 * jax.random.normal(keys[-2], (width, channels)),
        }

    def apply(params, x_t, t, y):
        said = jax.nn.one_hot(y, told) if labels else jnp.where(y["mask"][..., None], y["context"], 0).sum(axis=1)
        h = x_t.reshape(len(x_t), tokens, channels) @ params["embed"]["x"]
        h += jnp.tensordot(said, params["embed"]["y"], 1)
        features = [h]
        for block in params["blocks"]:
            h += jnp.tanh(h @ block["in"]) @ block["out"]
            features.append(h)
        t = over(t, x_t)
        total = (1 - t) ** 2 * deviation**2 + t**2
        mean = (h @ params["head"]).reshape(x_t.shape)
        return (t**2 * mean + (1 - t) * deviation**2 * x_t) / total, features

    rules = ((r"\bembed/y$", "- - *"), (r"\bblocks/\d+/in$", "- *"))
    return Model(init, apply, lambda params: params["blocks"], rules, grid=space.shape[:-1])
