"""Write tests/data/checkpoint_1.zip: a checkpoint of format 1, which every later version must read.

    python -m tests.checkpoint_fixture

Run once for each format, by the version that introduces it; a file that is there stays as it is.
"""

import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from diversedit_jax.training.checkpoint import FORMAT, Checkpoints

STEP = 7


def file(version: int) -> Path:
    return Path(__file__).parent / "data" / f"checkpoint_{version}.zip"


def state() -> dict:
    """What a trainer saves, small, of numbers that no random generator makes."""
    params = {"blocks": {"kernel": jnp.arange(12.0).reshape(2, 3, 2) / 7}, "head": jnp.bfloat16([1.5, -2.25])}
    opt = optax.adamw(1e-3).init(params)
    ema = jax.tree.map(lambda x: x / 2, params)
    return {"step": jnp.int32(STEP), "params": params, "ema": ema, "losses": {}, "opt": opt}


def meta() -> dict:
    return {"next_batch": STEP, "shape": [8, 8, 1], "num_classes": 10}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(file(FORMAT), "x", zipfile.ZIP_DEFLATED) as packed:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(STEP, state(), meta())
        for path in sorted(Path(folder).rglob("*")):
            packed.write(path, path.relative_to(folder))
