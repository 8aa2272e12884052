"""Where arrays live: a mesh with axes (data, fsdp), and rules from the path and shape of an array to its sharding.

The batch is split over both axes. Parameters, and whatever has their paths and shapes (EMA, optimizer moments), are
split over `fsdp` and copied over `data`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diversedit_jax.errors import ConfigError

AXES = ("data", "fsdp")
STACKED = (
    "shallow",
    "deep",
    "merges",
    "blocks",
)  # parameters with a leading layer axis, which a scan walks: never split
SMALLEST = 2**12  # elements; what is smaller is copied to all devices


def make_mesh(*, data: int = -1, fsdp: int = 1) -> Mesh:
    """All devices as a mesh of `data` x `fsdp`; -1 stands for what the other leaves."""
    count = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp}
    for name, other in (("data", fsdp), ("fsdp", data)):
        if sizes[name] == -1:
            if other < 1 or count % other:
                raise ConfigError(f"config.mesh: {count} devices cannot be divided by {other}")
            sizes[name] = count // other
    if min(sizes.values()) < 1 or sizes["data"] * sizes["fsdp"] != count:
        raise ConfigError(
            f"config.mesh = data {data} x fsdp {fsdp} = {data * fsdp} devices, but JAX sees {count}; -1 takes the rest"
        )
    devices = np.array(jax.devices()).reshape(sizes["data"], sizes["fsdp"])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def filled(batch: int) -> int:
    """The next number from `batch` on that all devices divide."""
    devices = jax.device_count()
    return -(-batch // devices) * devices


def over_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree, mesh: Mesh):
    """The sharding of each array of a state, from its path and shape.

    The largest axis that `fsdp` divides is split, the leading axis of stacked blocks aside.
    """

    def rule(path, leaf) -> NamedSharding:
        names = {getattr(entry, "key", None) for entry in path}
        first = 1 if names & set(STACKED) else 0
        shards = mesh.shape["fsdp"]
        axes = [i for i in range(first, len(leaf.shape)) if leaf.shape[i] % shards == 0]
        if shards == 1 or not axes or np.prod(leaf.shape) < SMALLEST:
            return replicated(mesh)
        spec = [None] * len(leaf.shape)
        spec[max(axes, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(rule, tree)


def placed(tree, shardings):
    """Abstract arrays with their shardings: what a restore and an ahead-of-time compilation take."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def put(tree, shardings):
    """Arrays that every process has on its host, where they live; `shardings` of each, or one for all."""

    def place(leaf: np.ndarray, where: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    tree = jax.tree.map(np.asarray, tree)
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: place(leaf, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def in_chunks(function: Callable[[jax.Array], Any], x: jax.Array, chunk: int, devices: int | None = None) -> Any:
    """`function` of x [b ...], of at most `chunk` entries of each of the `devices` (all) at a time, for less memory.

    Every part takes its entries from all devices, so that a batch that is split over them stays where it is. The result
    may be a pytree of arrays [b ...].
    """
    devices = devices or jax.device_count()
    rows = len(x) // devices if len(x) % devices == 0 else len(x)
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= chunk)
    if parts == 1:
        return function(x)
    spread = x.reshape(-1, parts, *x.shape[1:])
    done = jax.lax.map(function, jnp.moveaxis(spread, 1, 0))
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(len(x), *y.shape[2:]), done)


def agreed(numbers: Sequence[int]) -> set[int]:
    """Numbers that the first process knows, on every process."""
    if jax.process_count() == 1:
        return set(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.array(numbers or [0], np.int32), count)
    return set(multihost_utils.broadcast_one_to_all(mine).tolist()) if count else set()


def wait_for_all(what: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
