"""The public references' numbers in tests/data, in our layout: images [b h w c], parameters of `models.dit`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from diversedit_jax import models
from diversedit_jax.interop import sit

DATA = Path(__file__).parent / "data"
CONFIG = json.loads((DATA / "sit_config.json").read_text())
SHAPE = (CONFIG["input_size"], CONFIG["input_size"], CONFIG["in_channels"])
NULL = CONFIG["num_classes"]


def numbers(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/data/<name>.npz, images as [b h w c]."""
    images = {"lat", "noise", "xt", "out", "xT", "sde_eps", "euler", "euler_cfg", "heun_cfg", "sde", "sde_cfg"}
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: np.moveaxis(file[key], -3, -1) if key in images else file[key] for key in file.files}
        return {key: jnp.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype)) for key, value in arrays.items()}


def weights(name: str) -> dict[str, np.ndarray]:
    """A state dict under the reference's own names."""
    return load_file(DATA / f"{name}.safetensors")


def params(name: str):
    """A state dict as parameters of our model."""
    return sit.from_reference(weights(name), heads=CONFIG["num_heads"])


def model(skip: str, **options) -> models.Model:
    """Our model of the references' size; `skip` is `none` for sit_plain, `release` for sit_diversedit."""
    dims = {"depth": CONFIG["depth"], "width": CONFIG["hidden_size"], "heads": CONFIG["num_heads"]}
    return models.make("dit", SHAPE, NULL, skip=skip, patch=CONFIG["patch_size"], **dims, **options)
