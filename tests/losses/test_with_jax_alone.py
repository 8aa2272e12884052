"""The losses in an environment with jax and nothing else of what this package declares (`pip install --no-deps`)."""

import subprocess
import sys

from tests import ROOT

PROGRAM = """
import importlib.metadata
import sys

ALONE = {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "diversedit_jax", "jax_plugins"}
OTHERS = importlib.metadata.packages_distributions().keys() - ALONE

class Missing:
    def find_spec(name, *more):
        top = name.partition(".")[0]
        if top in OTHERS:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)

sys.meta_path.insert(0, Missing)
import jax
import jax.numpy as jnp
from diversedit_jax.losses import *
from diversedit_jax import losses

assert set(losses.__all__) <= set(globals())
blocks = [jax.random.normal(jax.random.key(i), (8, 16, 32)) for i in range(6)]
projector = init_projector(jax.random.key(0), 32, 64, 48)
targets = jax.random.normal(jax.random.key(9), (8, 16, 48))
found = [diversity_loss(blocks, settings=settings, key=jax.random.key(1))[0] for settings in DIVERSITY_PRESETS.values()]
found += [repa_loss(project(projector, blocks[0]), targets).mean(), sra_loss(*blocks[:2]).mean()]
found += [dispersive_loss(blocks[0])]
found += [jax.grad(lambda x: diversity_loss([x, *blocks[1:]])[0])(blocks[0])]
assert all(bool(jnp.isfinite(x).all()) for x in found), found
made = [losses.make(name) for name in ("diversity", "repa", "sra", "dispersive")]
assert "flax" in OTHERS and "flax" not in sys.modules
print("fine", len(made))
"""


def test_every_loss_computes_with_jax_alone():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine 4\n"
