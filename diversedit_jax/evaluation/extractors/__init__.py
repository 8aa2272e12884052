"""Networks whose features of images scores are computed from, one per file."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from diversedit_jax import registry
from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError


class Features(NamedTuple):
    """What a network says of images: float32, by image. None for what it does not have.

    pool:    [b d], of the image as a whole: Frechet and kernel distance, precision and recall.
    spatial: [b s], of its places: the Frechet distance of layouts, sFID.
    logits:  [b k], of classes: the inception score.
    """

    pool: Float[Array, "b d"] | np.ndarray
    spatial: Float[Array, "b s"] | np.ndarray | None = None
    logits: Float[Array, "b k"] | np.ndarray | None = None


class Extractor(NamedTuple):
    """A feature network.

    name:      scores are named by it; `inception` gives FID.
    init:      () -> its weights: arrays on the host, read from the file at the first call.
    apply:     (weights, images uint8 [b h w c]) -> Features.
    about:     what its features depend on, for a record of scores: `weights` with a `digest` of
               their values, how images are resized.
    reference: () -> images uint8 [n h w c] to compare with where no file of statistics is given, or None.
    chunk:     images that a device takes at a time. Last bits may depend on it, so it is the same on every machine.
    """

    name: str
    init: Callable[[], Params]
    apply: Callable[[Params, Array], Features]
    about: Mapping[str, Any]
    reference: Callable[[], UInt8[np.ndarray, "n h w c"]] | None = None
    chunk: int = 16


def digest(weights: Params) -> str:
    """sha256 of the values of weights, in hex: the same whatever kind of file they come from."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):  # in the order of their names
        array = np.ascontiguousarray(leaf, np.float32)
        found.update(f"{jax.tree_util.keystr(path)} {array.shape}".encode())
        found.update(array.astype("<f4", copy=False).data)
    return found.hexdigest()


def make(name: str, **options) -> Extractor:
    """The extractor `name`; the options are the keywords of `extractors.<name>.make`.

    Raises ConfigError for an option that is not known, or one without a default that is not given.
    """
    known = registry.options(registry.factory("evaluation.extractors", name))
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise ConfigError(f"extractors.{name}: give its {key}")
    return registry.make("evaluation.extractors", name, **options)
