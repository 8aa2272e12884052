"""What blocks see, as pictures: the first three principal components of their tokens as red, green and blue."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diversedit_jax import sharding
from diversedit_jax.analysis.subject import Subject
from diversedit_jax.api import Batch, Params


class Maps(NamedTuple):
    """images: what is shown, decoded where there is a decoder. maps: of every block. explained: by the components."""

    images: UInt8[np.ndarray, "k h w c"]
    maps: UInt8[np.ndarray, "l k gh gw 3"]
    explained: Float[np.ndarray, " l"]


def principal(subject: Subject, params: Params, batch: Batch, t: float, count: int = 4, seed: int = 0) -> Maps:
    """Maps of the first `count` images of a batch at time t; the components are those of all its tokens.

    Components of a block have the signs that agree best with those of the block before.
    """
    key = jax.random.key(seed)
    run = jax.jit(partial(_seen, subject, count), out_shardings=sharding.replicated(subject.layout))
    images, scores, explained = jax.device_get(run(params, subject.frozen, batch, jnp.float32(t), key))
    scores = np.array(scores)  # [l k n 3]
    h, w, _ = subject.shape
    patch = round((h * w / scores.shape[2]) ** 0.5)
    for i in range(1, len(scores)):
        agree = np.einsum("knc,knc->c", scores[i], scores[i - 1])
        scores[i] *= np.where(agree < 0, -1, 1)
    low, high = (np.quantile(scores, q, axis=(1, 2), keepdims=True) for q in (0.01, 0.99))
    levels = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    colours = np.round(255 * levels).astype(np.uint8).reshape(len(scores), -1, h // patch, w // patch, 3)
    return Maps(_as_levels(images), colours, explained)


def _seen(
    subject: Subject, count: int, params: Params, frozen: Any, batch: Batch, t: Array, key: Array
) -> tuple[Array, Array, Array]:
    """The first images, decoded where there is a decoder, and the components of their tokens in every block."""
    stack = subject.features(params, frozen, batch, t, key)
    codec = subject.parts.codec
    x = codec.encode(frozen, batch, key)["x"][:count]
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
    """Images as they are; of latents the first channels."""
    if x.dtype == np.uint8:
        return x
    x = x[..., : 3 if x.shape[-1] >= 3 else 1]
    low, high = np.quantile(x, 0.01), np.quantile(x, 0.99)
    return np.round(255 * np.clip((x - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8)
