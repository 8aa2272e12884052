"""Show blocks as pictures: the first three principal components of their tokens as red, green and blue."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from diversedit_jax import sharding
from diversedit_jax.analysis.features import Learned, features
from diversedit_jax.api import Batch
from diversedit_jax.codecs import encoded
from diversedit_jax.runs.build import Experiment
from diversedit_jax.runtime.pictures import as_pictures, image_grid, spaced


class Maps(NamedTuple):
    """Pictures of k examples for l blocks. Frames of a video, or slices of a volume, are a grid in each.

    explained: the share of the variance that the components explain.
    """

    images: UInt8[np.ndarray, "k h w c"]
    maps: UInt8[np.ndarray, "l k gh gw 3"]
    explained: Float[np.ndarray, " l"]


def principal(
    experiment: Experiment, learned: Learned, frozen: Any, batch: Batch, t: float, count: int = 4, seed: int = 0
) -> Maps | None:
    """Draw the first `count` examples of a batch at time t, by the components of all tokens of the batch.

    The signs of a block's components agree with the block before. None if tokens have no places (`Model.grid`).
    """
    parts = experiment.components
    grid, codec = parts.model.grid, parts.codec
    if grid is None:
        return None

    @jax.jit(out_shardings=sharding.replicated(experiment.layout))
    def run(learned, frozen, batch, t, key):
        def components(block):  # [b n d] -> of the first examples [k n 3], and the explained share
            tokens = block.reshape(-1, block.shape[-1])
            centred = tokens - tokens.mean(axis=0)
            values, vectors = jnp.linalg.eigh(jnp.einsum("td,te->de", centred, centred, precision="highest"))
            shown = centred.reshape(block.shape)[:count]
            return jnp.einsum("knd,dc->knc", shown, vectors[:, ::-1][:, :3]), values[-3:].sum() / values.sum()

        stack = features(experiment, learned, frozen, batch, t, key, False)
        x = encoded(codec, frozen, batch, key)["x"][:count]
        images = x if codec.decode is None else codec.decode(frozen, x)
        return images, *jax.lax.map(components, stack)

    images, scores, explained = jax.device_get(run(learned, frozen, batch, jnp.float32(t), jax.random.key(seed)))
    scores = np.array(scores)  # [l k n 3]
    for i in range(1, len(scores)):
        agree = np.einsum("knc,knc->c", scores[i], scores[i - 1])
        scores[i] *= np.where(agree < 0, -1, 1)
    maps = _in_the_plane(_as_levels(scores, axis=(1, 2)).reshape(-1, *grid, 3))
    if images.dtype != np.uint8:  # latents: show the first channels
        images = _as_levels(images[..., :3] if images.shape[-1] >= 3 else images[..., :1])
    if images.ndim == 5:  # as many frames or slices as the maps have
        images = images[:, spaced(images.shape[1], grid[0])]
    return Maps(_in_the_plane(images), maps.reshape(len(scores), -1, *maps.shape[1:]), explained)


def _in_the_plane(pictures: UInt8[np.ndarray, "k *s c"]) -> UInt8[np.ndarray, "k h w c"]:
    """Pictures, of a video or a volume a grid of its frames or slices."""
    return np.stack([image_grid(as_pictures(one)) for one in pictures]) if pictures.ndim == 5 else as_pictures(pictures)


def _as_levels(x: np.ndarray, axis: tuple[int, ...] | None = None) -> UInt8[np.ndarray, "..."]:
    """Scale values between their quantiles (over some axes) to 0 .. 255."""
    low, high = (np.quantile(x, q, axis=axis, keepdims=True) for q in (0.01, 0.99))
    return np.round(255 * np.clip((x - low) / np.maximum(high - low, 1e-12), 0, 1)).astype(np.uint8)
