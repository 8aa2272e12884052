"""What holds for every test: eight simulated CPU devices, and shapes in signatures checked at run time."""

import os

# Before jax is imported, and for the processes that tests start: a machine with an accelerator runs the same tests.
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping

# Meshes are tested in this process. The count can only be set before the first array.
jax.config.update("jax_num_cpu_devices", 8)

# Every annotation of the package is checked at each call, also under jit; outside of tests annotations cost nothing.
# Modules are instrumented when they are imported, so this comes before the first import of the package.
jaxtyping.install_import_hook("diversedit_jax", "beartype.beartype")
