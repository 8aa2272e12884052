"""Runs that were never trained: what a run leaves, with random weights, all of them, so that everything tells."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax.api import Conditions, Space
from diversedit_jax.data.digits import NUM_CLASSES, SHAPE
from diversedit_jax.runs import build
from diversedit_jax.training.checkpoint import Checkpoints

DIGITS = Space(SHAPE, Conditions.labels(NUM_CLASSES))


def randomly(shapes: Any, seed: int, scale: float) -> Any:
    """Normal numbers of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), shapes)


def leave(
    workdir: Path, config: ConfigDict, steps: Mapping[int, Iterable[str]], scale: float, space: Space = DIGITS
) -> None:
    """A run in `workdir`. steps: for each checkpoint the copies of parameters in it, such as `ema`."""
    configs.claim(workdir, config)
    model = build.build(config, space).components.model
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step, entries in steps.items():
            state = {entry: randomly(shapes, step + number, scale) for number, entry in enumerate(entries)}
            checkpoints.save(step, state, build.to_json(space))
