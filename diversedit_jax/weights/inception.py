"""Published weights of FID's Inception as parameters of `models.inception`.

Two kinds of file hold the same numbers. Each array has a name in both:

torch          pt_inception-2015-12-05-6726825d.pth of pytorch-fid and torch-fidelity, or its arrays as .safetensors.
TensorFlow     classify_image_graph_def.pb of the release from 2015, which ADM's evaluator reads: a frozen graph.

In the graph, TensorFlow numbers scopes that are opened again: conv, conv_1, ... A branch with several convolutions or
with a pool is a tower. All batch norms have a gamma of ones, which was never trained (tensorflow/tensorflow#564).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.models import inception
from diversedit_jax.models.inception import BLOCKS, CLASSES, WIDTH, Steps
from diversedit_jax.weights import hub, mapping
from diversedit_jax.weights.dit_names import CONV, LINEAR, SAME, Entry, Place, Turn
from diversedit_jax.weights.formats import NamedArrays, tf_graph
from diversedit_jax.weights.formats.weights_file import open_weights
from diversedit_jax.weights.mapping import Arrays, Shapes

WANTED = "pt_inception-2015-12-05-6726825d.pth (or its arrays as .safetensors) or classify_image_graph_def.pb"
IMAGENET = (1000, WIDTH)  # of torchvision's classifier


class Layout(NamedTuple):
    """The names of a kind of file. Those of a convolution and its batch norm follow the unit's name and `separator`."""

    separator: str
    kernel: str
    scale: str
    bias: str
    mean: str
    var: str
    classifier: str
    conv: Turn
    linear: Turn


BN = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
TF_BN = ("batchnorm/gamma", "batchnorm/beta", "batchnorm/moving_mean", "batchnorm/moving_variance")
LAYOUTS = {
    "torch": Layout(".", "conv.weight", *BN, "fc.weight", CONV, LINEAR),
    "tensorflow": Layout("/", "conv2d_params", *TF_BN, "softmax/weights", SAME, SAME),
}


class Unit(NamedTuple):
    """A convolution with its norm: its place in our tree, and its name in each layout."""

    place: Place
    torch: str
    tensorflow: str


class Release(NamedTuple):
    """The network in a file: its name, and read() -> params on the host."""

    name: str
    read: Callable[[], Params]


def open_inception(path: str | Path) -> Release:
    """The network in a file of either kind. The content of the file shows the kind.

    path: also a name on the hub, see `weights.hub`.
    Names and shapes are checked now; parameters are read at `read()`. Raises WeightsError for what is no weight file
    and ConfigError, with the array's name, for what does not fit.
    """
    name, path = hub.title(path), hub.local(path)
    what = f"inception: {path}"
    target = _shapes()
    with _opened(path) as (layout, arrays):
        if arrays.shapes.get("fc.weight") == IMAGENET:
            raise ConfigError(
                f"{what}: fc.weight has {IMAGENET[0]} rows: this is torchvision's classifier of ImageNet, not FID's "
                f"Inception, which has {CLASSES}; wanted {WANTED}"
            )
        mapping.check(what, entries(layout), _network_only(layout, arrays.shapes), target)

    def read() -> Params:
        with _opened(path) as (layout, arrays):
            return mapping.fill(what, entries(layout), arrays, target)

    return Release(name, read)


@cache
def entries(layout: str) -> tuple[Entry, ...]:
    """The arrays of the network in a layout, one of LAYOUTS."""
    names = LAYOUTS[layout]
    found = [Entry(("classifier", "kernel"), None, names.classifier, names.linear)]
    for unit in units():
        for leaf in ("kernel", "scale", "bias", "mean", "var"):
            name = getattr(unit, layout) + names.separator + getattr(names, leaf)
            found.append(Entry((*unit.place, leaf), None, name, names.conv if leaf == "kernel" else SAME))
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


def _branch(place: Place, torch: str, scope: str, steps: Steps) -> Iterator[Unit]:
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
def _opened(path: Path) -> Iterator[tuple[str, NamedArrays]]:
    """The layout of a file, and its arrays."""
    graph = tf_graph.starts(path)
    try:
        found = tf_graph.open_graph(path) if graph else open_weights(path)
    except WeightsError as error:
        raise WeightsError(f"{error}; FID's Inception is {WANTED}") from error
    with found:
        yield ("tensorflow", found) if graph else ("torch", Arrays(found))


def _network_only(layout: str, shapes: Shapes) -> Shapes:
    """The arrays that must be the network's.

    A torch file also holds the classifier's bias, which ADM leaves out, and arrays that only training needs. A graph
    also holds other constants: sizes, axes, the mean and scale of pixels.
    """
    if layout == "tensorflow":
        known = {entry.name for entry in entries(layout)}
        return {name: shape for name, shape in shapes.items() if name in known}
    extra = re.compile(r"AuxLogits\..*|fc\.bias|.*\.num_batches_tracked")
    return {name: shape for name, shape in shapes.items() if not extra.fullmatch(name)}
