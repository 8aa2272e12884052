"""Check on an accelerator what tests check on CPUs, and write what differs by how much.

    python -m tools.studies.gpu_checks OUT.json [--small]

1. Attention kernels and forms of the loop over blocks give one network and one gradient, in bfloat16.
2. Runs that train together under vmap are the runs alone.
3. A step in bfloat16 is close to one in float32.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from diversedit_jax.api import Conditions, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import dit
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import write_json
from diversedit_jax.runtime.versions import versions
from tools.studies.evidence.lanes import Engine, Group, Lane
from tools.studies.evidence.settings import PIECES, SIZES

BFLOAT16 = 0.02  # the most that a gradient in bfloat16 may differ, relative to its norm
FLOAT32 = 1e-3  # the most that a run may differ after a few steps, for sums in another order


def apart(a: Any, b: Any) -> float:
    """Return |a - b| / |b| over all arrays of two pytrees."""
    a, b = (np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(x)]) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def kernels(small: bool) -> dict[str, float]:
    """Return how far the gradient of each kernel and form is from that of the first."""
    side, kinds = (8, ("xla",)) if small else (32, ("xla", "cudnn"))
    space = Space((side, side, 4), Conditions.labels(1000))
    x, t, y = jax.random.normal(jax.random.key(1), (8, side, side, 4)), jnp.linspace(0.1, 0.9, 8), jnp.arange(8)
    found = {}
    for attention, unroll, dtype in [
        *itertools.product(kinds, (False, True), ("bfloat16",)),
        ("xla", False, "float32"),
    ]:
        size = {"size": "S", "depth": 4} if small else {"size": "S"}
        net = dit.make(space, {}, **size, skip="release", dtype=dtype, attention=attention, unroll=unroll)

        def loss(params, net=net):
            out, features = net.apply(params, x, t, y)
            return jnp.mean(out**2) + sum(jnp.mean(f.astype(jnp.float32) ** 2) for f in features) / len(features)

        def moved(leaf):
            return leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)

        params = jax.tree.map(moved, jax.jit(net.init)(jax.random.key(0)))
        found[f"{attention}, {'unrolled' if unroll else 'loop'}, {dtype}"] = jax.jit(jax.grad(loss))(params)
    first = next(iter(found.values()))
    return {name: apart(gradient, first) for name, gradient in found.items()}


def together(small: bool, data_dir: str | None) -> float:
    """Return how far two runs that train together are from the same runs with others beside them."""
    size = SIZES["small"] if small else SIZES["gpu"]._replace(steps=2 * PIECES, batch=64)
    name, options = size.data
    options = options | ({} if data_dir is None else {"data_dir": data_dir})
    ends = []
    for lanes in ([Lane(0, 1.0), Lane(1, 0.5)], [Lane(0, 1.0)]):
        count = size._replace(model=size.model | {"dtype": "float32"}, lanes=len(lanes), data=(name, options))
        group = Group(Engine(count, "both"), lanes)
        for _ in range(PIECES):
            group.train()
        ends.append(jax.tree.map(lambda leaf: leaf[0], jax.device_get(group.states["params"])))
    return apart(*ends)


def main(arguments: list[str]) -> None:
    """Check, write and say what is wrong."""
    if len(arguments) != 1:
        raise ConfigError("usage: python -m tools.studies.gpu_checks OUT.json; --help says more")
    small = flags.FLAGS.small
    gradients, runs = kernels(small), together(small, flags.FLAGS.data_dir)
    limits = dict.fromkeys(gradients, BFLOAT16) | {"runs together": FLOAT32}
    found = gradients | {"runs together": runs}
    for name, value in found.items():
        print(f"{name}: differs by {value:.2e}, at most {limits[name]:g}")
    write_json(Path(arguments[0]), {"versions": versions(), "differs by": found, "limits": limits})
    if wrong := [name for name, value in found.items() if not value <= limits[name]]:
        raise ConfigError(f"not within their limits: {'; '.join(wrong)}")


if __name__ == "__main__":
    flags.DEFINE_bool("small", False, "Small numbers, for a machine without an accelerator.")
    flags.DEFINE_string("data_dir", None, "Where the data are; by default where Debian has Fashion-MNIST.")
    cli.launch(main, arguments=True)
