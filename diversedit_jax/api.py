"""The contract between data, codecs, networks, objectives and losses: functions of arrays, on one page.

Axes: b batch, *s spatial (h w of an image, f h w of a video, d h w of a volume), c channels, n tokens, d width.
Time runs from t = 0 (data) to t = 1 (noise).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from diversedit_jax.registry import INT32, in_range
from diversedit_jax.shapes import Array, Float

Params = Any  # a pytree of arrays that gradients change
Memory = Any  # a pytree of arrays that a step reads and writes, without gradients: statistics, slow averages
Condition = Any  # a pytree of arrays [b ...]: labels [b], or {"context": [b m k], "mask": [b m]}, or whatever y is
Batch = Mapping[str, Any]  # arrays [b ...] by name; `y` is a Condition
Metrics = dict[str, Array]


class Conditions(NamedTuple):
    """The kind of condition that the examples of a data set have.

    null:    the empty condition of one example, without a batch axis. Guidance and dropout use it.
    classes: the number of labels, if a condition is a label 0 .. classes - 1. None for every other condition.
    names:   of the classes, for people; () if they are not known.
    """

    null: Condition
    classes: int | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def labels(cls, classes: int, names: Sequence[str] = ()) -> "Conditions":
        """Labels 0 .. classes - 1, with the null label `classes`. Without classes (0) every label is the null label."""
        in_range("num_classes", classes, 0, INT32 - 1)
        return cls(np.int32(classes), classes, tuple(names) if len(names) == classes else ())

    def named(self, y: Condition) -> list[str] | None:
        """The name of each label in y [b], or else its number. None if conditions are no labels."""
        if not self.classes:
            return None
        return [self.names[label] if self.names else str(label) for label in np.asarray(y).tolist()]


class Space(NamedTuple):
    """The space of the examples.

    shape: (*spatial, channels) of one example.
    video: the first spatial axis is time.
    """

    shape: tuple[int, ...]
    conditions: Conditions
    video: bool = False

    @property
    def kind(self) -> str:
        """What the examples are, in a word."""
        if self.video:
            return "videos"
        axes = len(self.shape) - 1
        return {2: "images", 3: "volumes"}.get(axes, f"{axes}-D examples")


@jax.tree_util.register_pytree_node_class
class Features(tuple):
    """The features of a network with two streams: a tuple of those of the image stream, and the others beside it.

    text: features of the text stream [b m d], one entry fewer: the last block gives no text.
    """

    text: tuple[Array, ...]

    def __new__(cls, image: Sequence[Any], text: Sequence[Any]) -> "Features":  # jax puts in its own leaves
        made = super().__new__(cls, image)
        made.text = tuple(text)
        return made

    def tree_flatten(self) -> tuple[tuple, None]:
        return (tuple(self), self.text), None

    @classmethod
    def tree_unflatten(cls, _, streams: tuple) -> "Features":
        return cls(*streams)


# (x_t [b *s c], t [b], y, **inputs) -> (prediction [b *s c], features).
# features[k] is the residual stream after k blocks, [b n d]; features[0] is the embedding. Of a network with two
# streams they are `Features`: those of the image. `Objective.inputs` names the `inputs`. A network is a closure over
# its parameters, so its caller knows no framework.
Network = Callable[..., tuple[Array, Sequence[Array]]]


class Skips(NamedTuple):
    """The m skip connections of a network, for analysis.

    pairs: (from_block, to_block), counted from 1.
    norms: params -> ([m], [m]): the norms of the weights on the current stream, and of the weights on the skip.
    cut:   (params, keep [m]) -> params. Connection i then passes keep[i] times its skip.
    """

    pairs: tuple[tuple[int, int], ...]
    norms: Callable[[Params], tuple[Array, Array]]
    cut: Callable[[Params, Array], Params]


class Made(NamedTuple):
    """A network as it was made, for another that starts from it.

    options: the name and all options of its model, as a slot of a config has them.
    space:   of its examples, as the network takes them.
    params:  its parameters, or their shapes.
    """

    options: Mapping[str, Any]
    space: Space
    params: Params


@dataclass(frozen=True)
class Rows:
    """A parameter [count ...] of which only some rows are given: values[i] is row at[i]. The others begin anew."""

    at: tuple[int, ...]
    values: np.ndarray
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return (self.count, *self.values.shape[1:])


class Model(NamedTuple):
    """A network as functions of its parameters, and what the package must know about its inside.

    init:   key -> params, nested dicts of arrays.
    apply:  (params, x_t, t, y, **inputs) -> (prediction, features), see `Network`.
    blocks: params -> one subtree for each block, in order, for the gradients of analysis. None: unknown.
    rules:  how its parameters are split over devices, see `sharding.RULES`.
    fresh:  top-level names of parameters that may be missing in a release to start from. They keep their new values.
    skips:  its skip connections. None: it has none.
    grid:   tokens along each spatial axis. None: tokens have no places.
    prefix: the number of tokens in the features before those of x.
    adapted: (what a run starts from, this network) -> (its parameters, changed to fit, and a line for each change).
            A leaf may be `Rows`. ConfigError if they cannot fit. None: they are taken as they are.
    """

    init: Callable[[Array], Params]
    apply: Callable[..., tuple[Array, Sequence[Array]]]
    blocks: Callable[[Params], Sequence[Params]] | None = None
    rules: tuple[tuple[str, str], ...] = ()
    fresh: tuple[str, ...] = ()
    skips: Skips | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    adapted: Callable[[Made, Made], tuple[Params, Sequence[str]]] | None = None

    def network(self, params: Params) -> Network:
        """The network with its parameters bound."""
        return partial(self.apply, params)


class Context(NamedTuple):
    """What a step gives to the objective and to each loss, besides the batch.

    key:      random key, different for the objective and for each loss.
    null:     the null condition of one example, see `Conditions`.
    step:     number of the step, from 0.
    params:   the loss's own parameters, as its `init` made them.
    memory:   the loss's own memory, as its `memory` made it or the last step returned it.
    teacher:  the network with EMA weights.
    training: False in analysis. No conditions are dropped then.
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

    loss:     of each example. The step takes the mean.
    x, noise, t, x_t, y: data, noise, time, the input of the network, and the condition after dropout.
    features: of each block, as the network returns them.
    rerun:    (network, t [b]) -> (prediction, features) of the same examples, noise and conditions at other times and
              by another network, for losses with a teacher. It is a pytree (`jax.tree_util.Partial`).
    memory:   the objective's new memory. None leaves it as it was.
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
    predicts: what the network predicts, one of `diffusion.predictions`, for the sampler. None: sampling is an error.
    inputs:   inputs of the network besides x_t, t and y: name -> shape for one example. The model is built for them.
    init:     (key, batch) -> its own parameters, trained beside those of the network. None: it has none.
    memory:   (batch) -> the memory of step 0. None: it has none.
    reads:    names in the batch that it needs besides `x` and `y`.
    learns_null: whether the network learns the null condition. Guidance needs it.
    """

    apply: Callable[[Network, Batch, Context], Forward]
    predicts: Any = None
    inputs: Mapping[str, tuple[int, ...]] = {}
    init: Callable[[Array, Batch], Params] | None = None
    memory: Callable[[Batch], Memory] | None = None
    reads: tuple[str, ...] = ()
    learns_null: bool = True


class Term(NamedTuple):
    """The term that an auxiliary loss adds to the objective.

    loss:    the weighted term.
    metrics: numbers for the log.
    full:    the term without warm-up, end or adaptive weight, for the gradients of analysis. None: the same as `loss`.
    memory:  the loss's new memory. None leaves it as it was.
    """

    loss: Array
    metrics: Metrics = {}  # noqa: RUF012 (never changed)
    full: Array | None = None
    memory: Memory = None


class AuxLoss(NamedTuple):
    """An auxiliary loss on the features of a network's blocks.

    apply:  (forward, batch, context) -> Term.
    init:   (key, forward, batch) -> its own parameters, such as a projector. None: it has none.
    memory: (forward, batch) -> the memory of step 0. None: it has none.
    blocks: `apply` reads only these features (k as in features[k]). The network splits its loop there and keeps only
            these in memory. Empty: it reads all blocks.
    reads:  names in the batch that it needs besides `x` and `y`, such as `features/dinov2`.
    """

    apply: Callable[[Forward, Batch, Context], Term]
    init: Callable[[Array, Forward, Batch], Params] | None = None
    memory: Callable[[Forward, Batch], Memory] | None = None
    blocks: tuple[int, ...] = ()
    reads: tuple[str, ...] = ()


class Codec(NamedTuple):
    """Both directions between stored data and the network's space, on device, with frozen weights.

    init:      () -> frozen weights.
    encode:    (frozen, batch, key) -> batch with `x` [b *s c]. It keeps everything else in the batch.
    decode:    (frozen, x [b *s c]) -> uint8 images [b ...]. None: there is no decoder, and samples stay as they are.
    condition: (frozen, stored condition [b ...]) -> y for the network. It also gets the null condition.
    shape:     the shape of a stored example -> the shape in the network's space.
    reads:     names in a stored batch that `encode` needs.
    """

    init: Callable[[], Params]
    encode: Callable[[Params, Batch, Array], Batch]
    decode: Callable[[Params, Array], Array] | None
    condition: Callable[[Params, Condition], Condition] = lambda frozen, condition: condition
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
    reads: tuple[str, ...] = ()
