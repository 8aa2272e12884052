"""The contract between networks, objectives, auxiliary losses and data: plain functions of arrays, one page.

Axes: b batch, h w c image (height, width, channels), n tokens, d width. Time runs from t = 0 (data) to t = 1 (noise).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Params = Any  # a pytree of arrays

# (x_t [b h w c], t [b], y [b], **conditions) -> (prediction [b h w c], features).
# features[k] is the residual stream after k blocks, [b n d]; features[0] is the embedding. The null label is
# `num_classes`. `conditions` are what an objective gives beside: `span` [b] (MeanFlow), `token` [b k] (REG). Given a
# token, it predicts the pair (image's [b h w c], token's [b k]), and features are [b 1 + n d], the token's first.
# A network is a closure over its parameters; nothing that calls it knows the framework behind it.
Network = Callable[..., tuple[Array, Sequence[Array]]]


class Forward(NamedTuple):
    """One forward pass of an objective: its loss per example, and all that auxiliary losses may read.

    rerun: (network, t [b]) -> (prediction, features) of the same examples with the same noise and labels, at other
        times and by another network: what a self-distilling loss asks its teacher. A pytree (`jax.tree_util.Partial`).
    """

    loss: Float[Array, " b"]
    x: Float[Array, "b h w c"]
    noise: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    x_t: Float[Array, "b h w c"]
    y: Int[Array, " b"]  # after label dropout
    features: Sequence[Float[Array, "b n d"]]
    metrics: Metrics
    rerun: Callable[[Network, Array], tuple[Array, Sequence[Array]]]


# (network, batch, key) -> Forward
Objective = Callable[[Network, Batch, Array], Forward]


class AuxLoss(NamedTuple):
    """An auxiliary loss: a pair of pure functions, as in optax.

    init:   (key, forward, batch) -> params; the parameters of heads, trained beside the model, {} if none.
    apply:  (params, forward, batch, teacher, step, key) -> (loss, metrics); the loss is the term as it is added to the
            objective, weighted; `teacher` is the network with EMA weights, `step` counts from 0.
    blocks: the features that `apply` reads one at a time (k as in features[k]). The network cuts its scans there, so
            that reading block k keeps one [b n d] alive and not the stack of all. Leave it empty to read them all.
    """

    init: Callable[[Array, Forward, Batch], Params]
    apply: Callable[[Params, Forward, Batch, Network, Array, Array], tuple[Array, Metrics]]
    blocks: tuple[int, ...] = ()


class Codec(NamedTuple):
    """Both directions between stored data and the network's space, on device, with frozen weights.

    init:   () -> frozen weights.
    encode: (frozen, batch, key) -> batch with `x` [b h w c] and `y` [b]; where encoders are configured also, float32,
            `features/<label>` [b n d], their patch tokens, and `token/<label>` [b d], their class token.
    decode: (frozen, x) -> uint8 images [b h w c]; None where no decoder is at hand.
    """

    init: Callable[[], Params]
    encode: Callable[[Params, Batch, Array], Batch]
    decode: Callable[[Params, Array], Array] | None
