"""The contract between data, codecs, networks, objectives and losses: functions of arrays, on one page.

Axes: b batch, *s spatial (h w of an image, f h w of a video, d h w of a volume), c channels, n tokens, d width.
Time runs from t = 0 (data) to t = 1 (noise).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

Params = Any  # a pytree of arrays that gradients change
Memory = Any  # a pytree of arrays that a step reads and writes, without gradients: statistics, slow averages
Condition = Any  # a pytree of arrays [b ...]: labels [b], or {"context": [b m k], "mask": [b m]}, or whatever y is
Batch = Mapping[str, Any]  # arrays [b ...] by name; `y` is a Condition
Metrics = dict[str, Array]


class Conditions(NamedTuple):
    """What the examples of a data set are conditioned on.

    null:    the condition of one example that says nothing, without a batch axis. Guidance and dropout use it.
    classes: the number of labels, where a condition is a label 0 .. classes - 1; None for every other condition.
    """

    null: Condition
    classes: int | None = None

    @classmethod
    def labels(cls, classes: int) -> "Conditions":
        """Labels 0 .. classes - 1, with the null label `classes`. Without classes (0) every label is the null label."""
        return cls(np.int32(classes), classes)


class Space(NamedTuple):
    """Where examples live. shape: (*spatial, channels) of one example. conditions: what they are conditioned on."""

    shape: tuple[int, ...]
    conditions: Conditions


# (x_t [b *s c], t [b], y, **inputs) -> (prediction [b *s c], features).
# features[k] is the residual stream after k blocks, [b n d]; features[0] is the embedding. `inputs` are those that the
# objective names in `Objective.inputs`. A network is a closure over its parameters: its caller knows no framework.
Network = Callable[..., tuple[Array, Sequence[Array]]]


class Skips(NamedTuple):
    """The skip connections of a network, as analysis looks at them.

    pairs: (shallow block, deep block), counted from 1; m of them.
    norms: params -> ([m], [m]): the norms of the weights that read the current stream, and of those that read the skip.
    cut:   (params, keep [m]) -> params in which connection i passes keep[i] times its skip.
    """

    pairs: tuple[tuple[int, int], ...]
    norms: Callable[[Params], tuple[Array, Array]]
    cut: Callable[[Params, Array], Params]


class Model(NamedTuple):
    """A network as functions of its parameters, and what the rest of the package must know of its inside.

    init:   key -> params, nested dicts of arrays.
    apply:  (params, x_t, t, y, **inputs) -> (prediction, features), see `Network`.
    blocks: params -> one subtree for each block, in order. Analysis reads gradients by it. None: it is not told.
    rules:  how its parameters are split over devices, see `sharding.RULES`.
    fresh:  top-level names of parameters that a release to start from may lack. They keep their new values.
    skips:  its skip connections, None if it has none.
    grid:   tokens along each spatial axis, None if tokens have no places.
    prefix: how many tokens of the features come before those of x.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., tuple[Array, Sequence[Array]]]
    blocks: Callable[[Params], Sequence[Params]] | None = None
    rules: tuple[tuple[str, str], ...] = ()
    fresh: tuple[str, ...] = ()
    skips: Skips | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    def network(self, params: Params) -> Network:
        """The network with its parameters bound."""
        return partial(self.apply, params)


class Context(NamedTuple):
    """What a step gives to the objective and to each loss, besides the batch.

    key:      random key, different for the objective and for each loss.
    null:     the condition of one example that says nothing.
    step:     number of the step, from 0.
    params:   its own parameters, as its `init` made them.
    memory:   its own memory, as its `memory` made it or as the step before returned it.
    teacher:  the network with EMA weights.
    training: False where nobody learns from the pass (analysis): conditions are then never dropped.
    """

    key: Array
    null: Condition = None
    step: Array | int = 0
    params: Params = None
    memory: Memory = None
    teacher: Network | None = None
    training: bool = True


class Forward(NamedTuple):
    """The forward pass of an objective: its loss per example, and everything that auxiliary losses may read.

    loss:     of each example; the step takes the mean.
    x, noise, t, x_t, y: data, noise, time, what the network saw, and its condition after dropout.
    features: of each block, as the network returns them.
    rerun:    (network, t [b]) -> (prediction, features) of the same examples with the same noise and conditions, at
              other times and by another network. A self-distilling loss asks its teacher so. A pytree
              (`jax.tree_util.Partial`).
    memory:   the objective's new memory; None leaves it as it was.
    """

    loss: Float[Array, " b"]
    x: Float[Array, "b *s c"]
    noise: Float[Array, "b *s c"]
    t: Float[Array, "b ..."]
    x_t: Float[Array, "b *s c"]
    y: Condition
    features: Sequence[Float[Array, "b n d"]]
    metrics: Metrics
    rerun: Callable[[Network, Array], tuple[Array, Sequence[Array]]]
    memory: Memory = None


class Objective(NamedTuple):
    """What a network learns, and how to sample from it.

    apply:    (network, batch, context) -> Forward.
    predicts: what the network gives, as `diffusion.predictions` describes it: Flow, Diffusion or AverageVelocity. The
              sampler reads it. None: this objective does not say how to sample, and sampling is an error.
    inputs:   what the network takes besides x_t, t and y: name -> shape of one example's. The model is built for it.
    init:     (key, batch) -> parameters of its own, trained beside the network's. None: it has none.
    memory:   (batch) -> the memory of step 0. None: it has none.
    reads:    names in the batch that it needs besides `x` and `y`.
    """

    apply: Callable[[Network, Batch, Context], Forward]
    predicts: Any = None
    inputs: Mapping[str, tuple[int, ...]] = {}
    init: Callable[[Array, Batch], Params] | None = None
    memory: Callable[[Batch], Memory] | None = None
    reads: tuple[str, ...] = ()


class Term(NamedTuple):
    """What an auxiliary loss adds to the objective.

    loss:    the term as it is added, weighted.
    metrics: numbers for the log.
    full:    the term at its full weight, without warm-up, end or adaptive weight: analysis takes its gradient. None:
             the same as `loss`.
    memory:  the loss's new memory; None leaves it as it was.
    """

    loss: Array
    metrics: Metrics = {}  # noqa: RUF012 (never changed)
    full: Array | None = None
    memory: Memory = None


class AuxLoss(NamedTuple):
    """An auxiliary loss on the features of a network's blocks.

    apply:  (forward, batch, context) -> Term.
    init:   (key, forward, batch) -> parameters of its own, such as a projector. None: it has none.
    memory: (forward, batch) -> the memory of step 0. None: it has none.
    blocks: the features that `apply` reads one at a time (k as in features[k]). The network splits its loop there, so
            that reading one block keeps one [b n d] in memory and not all of them. Empty: it reads all blocks.
    reads:  names in the batch that it needs besides `x` and `y`, such as `features/dinov2`.
    """

    apply: Callable[[Forward, Batch, Context], Term]
    init: Callable[[Array, Forward, Batch], Params] | None = None
    memory: Callable[[Forward, Batch], Memory] | None = None
    blocks: tuple[int, ...] = ()
    reads: tuple[str, ...] = ()


def unchanged(frozen: Params, value: Any) -> Any:
    """The value itself: what a codec does with conditions that need no encoding."""
    return value


class Codec(NamedTuple):
    """Both directions between stored data and the network's space, on device, with frozen weights.

    init:      () -> frozen weights.
    encode:    (frozen, batch, key) -> batch with `x` [b *s c]; everything else in the batch is kept.
    decode:    (frozen, x [b *s c]) -> uint8 images [b ...]. None: no decoder is at hand, samples stay as they are.
    condition: (frozen, stored condition [b ...]) -> y, as the network takes it. For dropout and guidance the null
               condition passes through it too.
    shape:     the shape of a stored example -> the shape in the network's space.
    """

    init: Callable[[], Params]
    encode: Callable[[Params, Batch, Array], Batch]
    decode: Callable[[Params, Array], Array] | None
    condition: Callable[[Params, Condition], Condition] = unchanged
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
