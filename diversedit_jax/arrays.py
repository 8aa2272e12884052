"""Arrays as a caller has them: of jax, of numpy or of another framework, under any kind of mesh axes."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def portable(function: Callable) -> Callable:
    """Let a function of arrays take those of any framework, also under explicit axes of a mesh.

    Arrays of numpy, and all that has `__jax_array__` or speaks DLPack, such as a tensor of torch, become arrays of jax.
    Whole numbers of numpy stay: they may have to be known while jax traces.

    Where axes of a mesh are explicit (`jax.make_mesh`), the compiler shards what is inside, and every device gets the
    whole result. Outside of `jax.jit` such a call is compiled anew each time.
    """

    @wraps(function)
    def call(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_has_own_array)
        leaves = [_converted(leaf) for leaf in leaves]
        meshes = {i: jax.typeof(leaf).sharding.mesh for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
        explicit = {i: mesh for i, mesh in meshes.items() if AxisType.Explicit in mesh.axis_types}

        def inside(arrays: dict[int, jax.Array]) -> Any:
            args, kwargs = tree.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            return function(*args, **kwargs)

        if not explicit:
            return inside({})
        mesh = next(iter(explicit.values()))
        names = tuple(
            name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
        )
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.jit(jax.sharding.auto_axes(inside, axes=names, out_sharding=whole))({i: leaves[i] for i in explicit})

    return call


def _has_own_array(x: Any) -> bool:
    return hasattr(x, "__jax_array__")


def _converted(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return jnp.asarray(x) if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.floating) else x
    if isinstance(x, jax.Array | np.generic):
        return x
    if _has_own_array(x):
        return jnp.asarray(x)
    return jnp.from_dlpack(x) if hasattr(x, "__dlpack__") else x
