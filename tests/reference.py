"""The public references' numbers in tests/data, in our layout: images [b h w c], parameters of `models.dit`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from diversedit_jax import models
from diversedit_jax.api import Conditions, Model, Space
from diversedit_jax.weights import dit as releases

DATA = Path(__file__).parent / "data"
CONFIG = json.loads((DATA / "sit_config.json").read_text())
SHAPE = (CONFIG["input_size"], CONFIG["input_size"], CONFIG["in_channels"])
NULL = CONFIG["num_classes"]
SPACE = Space(SHAPE, Conditions.labels(NULL))
OFFICIAL = json.loads((DATA / "official_config.json").read_text())


def numbers(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/data/<name>.npz, images as [b h w c]."""
    images = {"lat", "noise", "xt", "out", "xT", "sde_eps", "euler", "euler_cfg", "heun_cfg", "sde", "sde_cfg"}
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {key: np.moveaxis(file[key], -3, -1) if key in images else file[key] for key in file.files}
        return {key: jnp.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype)) for key, value in arrays.items()}


def weights(name: str) -> dict[str, np.ndarray]:
    """A state dict under the reference's own names."""
    return load_file(DATA / f"{name}.safetensors")


def released(name: str, family: str, heads: int):
    """A state dict as parameters of our model, through the public import."""
    arrays = weights(name)
    shapes = {key: array.shape for key, array in arrays.items()}
    return releases.load(arrays, shapes, family, heads).params


def params(name: str):
    """A state dict as parameters of our model."""
    return released(name, "sit", CONFIG["num_heads"])


def model(skip: str, **options) -> Model:
    """Our model of the references' size; `skip` is `none` for sit_plain, `release` for sit_diversedit."""
    dims = {"depth": CONFIG["depth"], "width": CONFIG["hidden_size"], "heads": CONFIG["num_heads"]}
    return models.make("dit", SPACE, skip=skip, patch=CONFIG["patch_size"], **dims, **options)


def official_numbers(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/data/<name>.npz of the official SiT or DiT, images as [b h w c]."""
    with np.load(DATA / f"{name}.npz") as file:
        return {key: np.moveaxis(file[key], -3, -1) if file[key].ndim >= 4 else file[key] for key in file.files}


def official_params(name: str):
    """A state dict of the official SiT or DiT as parameters of our model."""
    return released(name, name, OFFICIAL["num_heads"])


def official_model() -> Model:
    """Our model of the official ones' size, with their 2 c output channels."""
    config = OFFICIAL
    dims = {"depth": config["depth"], "width": config["hidden_size"], "heads": config["num_heads"]}
    shape = (config["input_size"], config["input_size"], config["in_channels"])
    options = {"patch": config["patch_size"], "out_channels": 2 * config["in_channels"], **dims}
    return models.make("dit", Space(shape, Conditions.labels(config["num_classes"])), **options)
