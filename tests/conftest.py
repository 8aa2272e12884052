"""What holds for every test: eight simulated CPU devices, and shapes in signatures checked at run time."""

import atexit
import gc
import os
import shutil
import tempfile
from importlib.metadata import version

from tools.chaos.processes import IN_ORDER

# Before jax is imported, and for the processes that tests start: a machine with an accelerator runs the same tests.
os.environ["JAX_PLATFORMS"] = "cpu"

if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has what the process that started it has set
    # Most of the time goes into compiling; without LLVM's optimisations that takes half as long, and with XLA's older
    # form of fusions half of that. Both cores are busy: a program in one part takes less than in 32 side by side.
    # A flag that a jaxlib does not know would end the process.
    fast = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    fast += ["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *fast, IN_ORDER]).strip()

    # What one test has compiled, another need not: many start the same small run, some of them as a process.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="diversedit-xla-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import jaxtyping

# What jax traces and compiles lives long. By default Python looks through all of it again and again, 4% of the run.
gc.set_threshold(100_000, 20, 100)

# Meshes are tested in this process. The count can only be set before the first array.
jax.config.update("jax_num_cpu_devices", 8)

# Every annotation of the package is checked at each call, also under jit; outside of tests annotations cost nothing.
# Modules are instrumented when they are imported, so this comes before the first import of the package.
jaxtyping.install_import_hook("diversedit_jax", "beartype.beartype")
