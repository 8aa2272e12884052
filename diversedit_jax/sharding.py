"""Where arrays live: a mesh with axes (data, fsdp), and rules from the path and shape of an array to its sharding.

The batch is split over both axes. Parameters, and whatever has their paths and shapes (EMA, optimizer moments), are
split over `fsdp` and copied over `data`.
"""

import jax
import numpy as np
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
