"""Published weights of FID's Inception as parameters of `models.inception`.

Two kinds of file hold the same numbers, and each array has a name in both:

torch          pt_inception-2015-12-05-6726825d.pth of pytorch-fid and torch-fidelity, or its arrays as .safetensors.
TensorFlow     classify_image_graph_def.pb of the release from 2015, which ADM's evaluator reads: a frozen graph.

The names in the graph are those that TensorFlow gives to scopes when they are opened again: conv, conv_1, ...; a branch
of several convolutions, or with a pool, is a tower. All its batch norms have a gamma, which was never trained: ones
(tensorflow/tensorflow#564).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.models import inception
from diversedit_jax.models.inception import BLOCKS, CLASSES, WIDTH, Steps
from diversedit_jax.weights import mapping
from diversedit_jax.weights.dit_names import CONV, LINEAR, SAME, Entry, Turn
from diversedit_jax.weights.formats import tf_graph
from diversedit_jax.weights.formats.tf_graph import Constants
from diversedit_jax.weights.formats.weights_file import open_weights
from diversedit_jax.weights.mapping import Arrays

WANTED = "pt_inception-2015-12-05-6726825d.pth (or its arrays as .safetensors) or classify_image_graph_def.pb"
IMAGENET = (1000, WIDTH)  # of torchvision's classifier


class Layout(NamedTuple):
    """The names of a kind of file: of one convolution and its batch norm, behind the unit's; and of the classifier."""

    kernel: str
    scale: str
    bias: str
    mean: str
    var: str
    classifier: str
    conv: Turn
    linear: Turn


LAYOUTS = {
    "torch": Layout(
        kernel="conv.weight",
        scale="bn.weight",
        bias="bn.bias",
        mean="bn.running_mean",
        var="bn.running_var",
        classifier="fc.weight",
        conv=CONV,
        linear=LINEAR,
    ),
    "tensorflow": Layout(
        kernel="conv2d_params",
        scale="batchnorm/gamma",
        bias="batchnorm/beta",
        mean="batchnorm/moving_mean",
        var="batchnorm/moving_variance",
        classifier="softmax/weights",
        conv=SAME,
        linear=SAME,
    ),
}


class Unit(NamedTuple):
    """A convolution with its norm: where it is in our tree, and its name in each layout."""

    place: tuple[str | int, ...]
    torch: str
    tensorflow: str


class Release(NamedTuple):
    """The network in a file: its name, and read() -> params on the host."""

    name: str
    read: Callable[[], Params]


def open_inception(path: str | Path) -> Release:
    """The network in a file of either kind, told apart by content.

    Names and shapes are checked now; parameters are read at `read()`. Raises WeightsError for what is no weight file
    and ConfigError, with the array's name, for what does not fit.
    """
    path = Path(path).expanduser()
    what = f"inception: {path}"
    target = _shapes()
    with _opened(path) as (layout, arrays):
        _check_classes(what, arrays.shapes)
        mapping.check(what, entries(layout), _without_rest(layout, arrays.shapes), target)

    def read() -> Params:
        empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), target)
        with _opened(path) as (layout, arrays):
            return mapping.fill(what, entries(layout), arrays, empty)

    return Release(path.resolve().name, read)


@cache
def entries(layout: str) -> tuple[Entry, ...]:
    """The arrays of the network in a layout, one of LAYOUTS."""
    names = LAYOUTS[layout]
    separator = "." if layout == "torch" else "/"
    found = [Entry(("classifier", "kernel"), None, names.classifier, names.linear)]
    for unit in units():
        name = getattr(unit, layout) + separator
        found.append(Entry((*unit.place, "kernel"), None, name + names.kernel, names.conv))
        for leaf in ("scale", "bias", "mean", "var"):
            found.append(Entry((*unit.place, leaf), None, name + getattr(names, leaf), SAME))
    return tuple(found)


def units() -> Iterator[Unit]:
    """Every convolution of the network, with its names."""
    for i, torch in enumerate(("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")):
        yield Unit(("stem", "units", i), f"Conv2d_{torch}", _again("conv", i))
    for number, (block, branches) in enumerate(BLOCKS.items()):
        scope, towers = _again("mixed", number), 0
        for branch, steps in branches.items():
            place, torch = ("blocks", block, branch, "units"), f"Mixed_{block}.{branch}"
            if len(steps) == 1:
                yield from _branch(place, torch, scope, steps)
            else:
                yield from _branch(place, torch, f"{scope}/{_again('tower', towers)}", steps)
                towers += 1


def _branch(place: tuple, torch: str, scope: str, steps: Steps) -> Iterator[Unit]:
    """The units of a branch. Where several share a step they have letters in torch, and a scope of their own."""
    counts, index = [len(step) for step in steps if not isinstance(step, str)], 0
    for i, among in enumerate(counts):
        for k in range(among):
            name = torch if sum(counts) == 1 else f"{torch}_{i + 1}{'ab'[k] if among > 1 else ''}"
            inner = f"mixed/{_again('conv', k)}" if among > 1 else _again("conv", i)
            yield Unit((*place, index), name, f"{scope}/{inner}")
            index += 1


def _again(name: str, index: int) -> str:
    """The name of a scope that was opened `index` times before."""
    return f"{name}_{index}" if index else name


@cache
def _shapes() -> Params:
    return jax.eval_shape(inception.network().init, jax.random.key(0))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[str, Arrays | Constants]]:
    """The layout of a file, and its arrays."""
    graph = tf_graph.starts(path)
    try:
        found = tf_graph.open_graph(path) if graph else open_weights(path)
    except WeightsError as error:
        raise WeightsError(f"{error}; FID's Inception is {WANTED}") from error
    if graph:
        yield "tensorflow", found
    else:
        with found:
            yield "torch", Arrays(found)


def _without_rest(layout: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The arrays that have to be the network's.

    The rest is, in torch, the bias of the classifier, which ADM leaves out, and what serves training; in a graph every
    constant of another name: sizes, axes, the mean and scale of pixels.
    """
    if layout == "tensorflow":
        names = {entry.name for entry in entries(layout)} & set(shapes)
    else:
        names = {name for name in shapes if not name.startswith("AuxLogits.")}
        names -= {"fc.bias"} | {name for name in names if name.endswith(".num_batches_tracked")}
    return {name: shapes[name] for name in shapes if name in names}


def _check_classes(what: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if shapes.get("fc.weight") == IMAGENET:
        raise ConfigError(
            f"{what}: fc.weight has {IMAGENET[0]} rows: this is torchvision's classifier of ImageNet, not FID's "
            f"Inception, which has {CLASSES}; wanted {WANTED}"
        )
