"""What blocks see, as pictures: the first three principal components of their tokens as red, green and blue."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diversedit_jax import sharding
from diversedit_jax.analysis.features import Learned, features, prepared
from diversedit_jax.api import Batch
from diversedit_jax.runs.build import Experiment
from diversedit_jax.runtime.pictures import as_pictures


class Maps(NamedTuple):
    """images: what is shown, decoded where there is a decoder. maps: of every block. explained: by the components."""

    images: UInt8[np.ndarray, "k h w c"]
    maps: UInt8[np.ndarray, "l k gh gw 3"]
    explained: Float[np.ndarray, " l"]


def principal(
    experiment: Experiment, learned: Learned, frozen: Any, batch: Batch, t: float, count: int = 4, seed: int = 0
) -> Maps | None:
    """Maps of the first `count` examples of a batch at time t; the components are those of all its tokens.

    Components of a block have the signs that agree best with those of the block before. None where tokens have no
    places (`Model.grid`).
    """
    grid = experiment.components.model.grid
    if grid is None:
        return None
    run = jax.jit(partial(_seen, experiment, count), out_shardings=sharding.replicated(experiment.layout))
    images, scores, explained = jax.device_get(run(learned, frozen, batch, jnp.float32(t), jax.random.key(seed)))
    scores = np.array(scores)  # [l k n 3]
    for i in range(1, len(scores)):
        agree = np.einsum("knc,knc->c", scores[i], scores[i - 1])
        scores[i] *= np.where(agree < 0, -1, 1)
    low, high = (np.quantile(scores, q, axis=(1, 2), keepdims=True) for q in (0.01, 0.99))
    levels = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    colours = np.round(255 * levels).astype(np.uint8).reshape(-1, *grid, 3)
    maps = as_pictures(colours)
    return Maps(_as_levels(images), maps.reshape(len(scores), -1, *maps.shape[1:]), explained)


def _seen(
    experiment: Experiment, count: int, learned: Learned, frozen: Any, batch: Batch, t: Array, key: Array
) -> tuple[Array, Array, Array]:
    """The first examples, decoded where there is a decoder, and the components of their tokens in every block."""
    stack = features(experiment, learned, frozen, batch, t, key, False)
    codec = experiment.components.codec
    x = prepared(experiment, frozen, batch, key)["x"][:count]
    images = x if codec.decode is None else codec.decode(frozen, x)
    return images, *_components(count, stack)


def _components(count: int, stack: Float[Array, "l b n d"]) -> tuple[Array, Array]:
    """The first three components of the tokens of the first images, [l k n 3], and what they explain, [l]."""

    def block(features: Float[Array, "b n d"]) -> tuple[Array, Array]:
        tokens = features.reshape(-1, features.shape[-1])
        centred = tokens - tokens.mean(axis=0)
        values, vectors = jnp.linalg.eigh(jnp.einsum("td,te->de", centred, centred, precision="highest"))
        shown = centred.reshape(features.shape)[:count]
        return jnp.einsum("knd,dc->knc", shown, vectors[:, ::-1][:, :3]), values[-3:].sum() / values.sum()

    return jax.lax.map(block, stack)


def _as_levels(x: np.ndarray) -> UInt8[np.ndarray, "k h w c"]:
    """Examples as images, uint8; of latents the first channels, from their least to their largest value."""
    if x.dtype != np.uint8:
        low, high = (np.quantile(x[..., :3] if x.shape[-1] >= 3 else x[..., :1], q) for q in (0.01, 0.99))
        x = np.round(255 * np.clip((x - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)
    return as_pictures(x)
