"""Feature networks for scores, one per file."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from diversedit_jax import registry
from diversedit_jax.api import Condition, Params
from diversedit_jax.errors import ConfigError


class Features(NamedTuple):
    """Features of images or videos, float32. None: the network does not have them.

    pool:    [b d], of the whole image: for Frechet and kernel distance, precision and recall.
    spatial: [b s], of places in the image: for sFID.
    logits:  [b k], of classes: for the inception score.
    match:   [b], how well each image matches its condition, 0 .. 100: for the CLIP score.
    """

    pool: Float[Array, "b d"] | np.ndarray
    spatial: Float[Array, "b s"] | np.ndarray | None = None
    logits: Float[Array, "b k"] | np.ndarray | None = None
    match: Float[Array, " b"] | np.ndarray | None = None


class Extractor(NamedTuple):
    """A feature network.

    name:      part of the names of scores; `inception` gives FID.
    init:      () -> weights, on the host; the first call reads the file.
    apply:     (weights, images uint8 [b h w c] or videos [b f h w c]) -> Features. ConfigError for another shape.
    about:     everything that can change the features: `weights` with a `digest` of their values, `resize`.
    reference: () -> samples uint8 [n *s c] to compare with if no reference is given; None: there are none.
    chunk:     images that a device takes at a time, the same on every machine because last bits may depend on it.
    match:     (weights, Features, stored conditions y [b ...]) -> `Features.match`. None: it sees images alone.
    check:     of an extractor with `match`: raises ConfigError for conditions y that it cannot read.
    """

    name: str
    init: Callable[[], Params]
    apply: Callable[[Params, Array], Features]
    about: Mapping[str, Any]
    reference: Callable[[], UInt8[np.ndarray, "n *s c"]] | None = None
    chunk: int = 16
    match: Callable[[Params, Features, Array], Array] | None = None
    check: Callable[[Condition], None] | None = None


def digest(weights: Params) -> str:
    """sha256 of the values of weights, in hex. It does not depend on their file format."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        array = np.ascontiguousarray(leaf, np.float32)
        found.update(f"{jax.tree_util.keystr(path)} {array.shape}".encode())
        found.update(array.astype("<f4", copy=False).data)
    return found.hexdigest()


def make(name: str, **options) -> Extractor:
    """The extractor `name`. options: keywords of `extractors.<name>.make`; ConfigError if a required one is missing."""
    known = registry.options(registry.factory("evaluation.extractors", name))
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise ConfigError(f"extractors.{name}: give its {key}")
    return registry.make("evaluation.extractors", name, **options)
