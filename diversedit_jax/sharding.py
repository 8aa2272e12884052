"""Where arrays live: a mesh with axes (data, fsdp, tensor), and rules from an array's name to its sharding.

The batch is split over `data` and `fsdp`. Parameters, and arrays with their names and shapes (EMA, optimizer moments),
are copied over `data` and split over `fsdp`: each layer is gathered where it is used. Over `tensor` the heads of
attention and the hidden units of the MLP are split, and computed there (Megatron, arXiv 1909.08053). Only `data` runs
across slices or a slow network. The other two stay within a slice.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diversedit_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what the batch is split over
SMALLEST = 2**12  # elements; a smaller array is copied to all devices

# (pattern, axes): the first rule whose pattern is found in the name of an array decides how its axes are split:
#     -                      not split
#     fsdp, tensor           over this axis of the mesh; fsdp+tensor: over both
#     *                      the largest of these axes that can be split takes the axes of the mesh that are left
#     ...                    the word before it, for all axes that are left
# A word for an axis of the mesh counts as * if that axis has size 1. The rules of a config come first, then those of
# the model (`Model.rules`), then these. A stack of layers, `blocks`, keeps its layer axis whole.
RULES = ((r"\bblocks/", "- * ..."), (r"", "* ..."))


class Layout(NamedTuple):
    """The devices of a run, and the rules that split arrays over them."""

    mesh: Mesh
    rules: tuple[tuple[str, str], ...] = RULES  # those of the config, then RULES

    @property
    def shards(self) -> int:
        """The number of parts of a batch."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def with_rules(self, rules: Sequence[tuple[str, str]]) -> "Layout":
        """The layout with the rules of a model after those of the config."""
        own = self.rules[: len(self.rules) - len(RULES)]
        return self._replace(rules=(*own, *rules, *RULES))


def make(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    rules: Sequence[tuple[str, str]] = (),
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """All devices as a mesh of `data` x `fsdp` x `tensor`. One size may be -1: it takes the rest.

    rules: come before RULES, in the same form. devices: of another machine, to compile for it.
    """
    devices = list(jax.devices() if devices is None else devices)
    given = {"data": data, "fsdp": fsdp, "tensor": tensor}
    rest = [name for name, size in given.items() if size == -1]
    known = math.prod(size for size in given.values() if size != -1)
    sizes = given | ({rest[0]: len(devices) // known} if len(rest) == 1 and known > 0 else {})
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in given.items())
        raise ConfigError(
            f"config.mesh: {product} must give the {len(devices)} devices that JAX sees; one size may be -1 (the rest)"
        )
    tpu, shape = devices[0].platform == "tpu", tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if sizes["data"] % slices:
        raise ConfigError(
            f"config.mesh.data = {sizes['data']} must be a multiple of the {slices} slices; "
            "fsdp and tensor cannot span slices"
        )
    options = {"devices": devices, "allow_split_physical_axes": True}  # neighbours get links between them
    if not tpu:
        arranged = np.array(devices).reshape(shape)
    elif slices > 1:
        within = (shape[0] // slices, *shape[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), **options)
    else:
        arranged = mesh_utils.create_device_mesh(shape, **options)
    mesh = Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Layout(mesh, (*(_checked(pattern, axes) for pattern, axes in rules), *RULES))


def _checked(pattern: str, axes: str) -> tuple[str, str]:
    """A rule of a config. ConfigError if it cannot be read."""
    place = f"config.mesh.rules: ({pattern!r}, {axes!r})"
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{place}: {error}") from None
    for word in axes.removesuffix(" ...").split():
        if word not in ("-", "*") and not set(word.split("+")) <= {"fsdp", "tensor"}:
            raise ConfigError(f"{place}: {word!r} is none of -, *, fsdp, tensor, fsdp+tensor")
    return pattern, axes


def filled(batch: int, devices: int | None = None) -> int:
    """`batch` rounded up to a multiple of the number of devices (None: all)."""
    devices = devices or jax.device_count()
    return -(-batch // devices) * devices


def over_batch(layout: Layout) -> NamedSharding:
    """The leading axis split over the axes of the batch."""
    return NamedSharding(layout.mesh, PartitionSpec(BATCH))


def replicated(layout: Layout) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(layout.mesh, PartitionSpec())


def kept_over_batch(x: jax.Array) -> jax.Array:
    """Tell the compiler that x [b ...] stays split by examples. Does nothing outside `jax.set_mesh`.

    Without this the compiler may exchange the examples instead of gathering parameters that are split over the same
    devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *[None] * (x.ndim - 1)))


def name_of(path: tuple) -> str:
    """The name of an array in a pytree, such as `ema/blocks/kernel` or `opt/0/mu/blocks/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_name(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree by name."""
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def shardings(tree, layout: Layout):
    """The sharding of each array of a state, by the rules."""

    def sharding(path, leaf) -> NamedSharding:
        name = name_of(path)
        axes = next(axes for pattern, axes in layout.rules if re.search(pattern, name))
        return NamedSharding(layout.mesh, _spec(name, tuple(leaf.shape), axes, dict(layout.mesh.shape)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _spec(name: str, shape: tuple[int, ...], axes: str, sizes: dict[str, int]) -> PartitionSpec:
    """The axes of a rule applied to an array."""
    words = axes.split()
    if words and words[-1] == "...":
        words = (words[:-1] + words[-2:-1] * len(shape))[: len(shape)]
    if len(words) != len(shape):
        raise ConfigError(
            f"config.mesh.rules: {axes!r} must have a word for each of the {len(shape)} axes of {name} {list(shape)}"
        )
    spec = [() if word in "-*" else tuple(axis for axis in word.split("+") if sizes[axis] > 1) for word in words]
    for i, split in enumerate(spec):
        if shape[i] % (parts := math.prod(sizes[axis] for axis in split)):
            raise ConfigError(
                f"config.mesh: {'+'.join(split)} = {parts} does not divide axis {i} of {name} {list(shape)}"
            )
    unused = [axis for axis in ("fsdp", "tensor") if sizes[axis] > 1 and axis not in sum(spec, ())]
    free = [i for i, word in enumerate(words) if word != "-" and not spec[i]] if math.prod(shape) >= SMALLEST else []
    for split in dict.fromkeys((tuple(unused), tuple(unused[:1]), tuple(unused[1:]))):
        fits = [i for i in free if shape[i] % math.prod(sizes[axis] for axis in split) == 0]
        if split and fits:
            spec[max(fits, key=lambda i: shape[i])] = split
            break
    named = (split[0] if len(split) == 1 else split or None for split in spec)
    return PartitionSpec(*named) if any(spec) else PartitionSpec()


def platform() -> str:
    """The platform of the mesh that is set, else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device  # None where no mesh is set
    return jax.default_backend() if device is None else device.platform


def rows(layout: Layout, batch: int) -> list[int]:
    """The rows of a batch that lie on the devices of this process, in order. It reads only these."""
    places = over_batch(layout).addressable_devices_indices_map((batch,)).values()
    return sorted({row for place in places for row in range(batch)[place[0]]})


def from_rows(local: Mapping[str, Any], layout: Layout, batch: int) -> dict[str, Any]:
    """A batch over all devices, arrays [batch ...], from the `rows` that each process has."""
    place = over_batch(layout)
    at = {row: i for i, row in enumerate(rows(layout, batch))}

    def placed(mine: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            begin, end, _ = index[0].indices(batch)
            return mine[at[begin] : at[end - 1] + 1]

        return jax.make_array_from_callback((batch, *mine.shape[1:]), place, part)

    return jax.tree.map(placed, dict(local))


def placed(tree, shardings):
    """Abstract arrays with their shardings, for a restore or an ahead-of-time compilation."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def put(tree, shardings):
    """Put host arrays that every process has on their devices. shardings: one for each array, or one for all."""

    def place(leaf: np.ndarray, where: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    tree = jax.tree.map(np.asarray, tree)
    one = isinstance(shardings, NamedSharding)
    return jax.tree.map(place, tree, jax.tree.map(lambda leaf: shardings, tree) if one else shardings)


def in_chunks(function: Callable[[Any], Any], x: Any, chunk: int, devices: int | None = None) -> Any:
    """`function` of x [b ...], with at most `chunk` entries per device at a time, for less memory.

    function, x: the result and x may be pytrees of arrays [b ...]. devices: None: all.
    Every part takes entries from all devices, so a batch that is split over them stays where it is.
    """
    devices = devices or jax.device_count()
    count = len(jax.tree.leaves(x)[0])
    rows = count // devices if count % devices == 0 else count
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= chunk)
    if parts == 1:
        return function(x)
    spread = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, parts, *a.shape[1:]), 1, 0), x)
    done = jax.lax.map(function, spread)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(count, *y.shape[2:]), done)


def agreed(numbers: Sequence[int]) -> set[int]:
    """The numbers of the first process, on every process."""
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.array(numbers or [0], np.int32), count)
    return set(multihost_utils.broadcast_one_to_all(mine).tolist()) if count else set()


def wait_for_all(what: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
