"""Stand-ins for the files of a config: shapes of examples and batches, and encoders in their published size."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diversedit_jax import registry
from diversedit_jax.api import Conditions, Space
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import clip_text, vit
from diversedit_jax.runs import build
from diversedit_jax.weights import clip_text as clip_text_files
from diversedit_jax.weights import mapping
from diversedit_jax.weights.formats.weights_file import write_safetensors
from diversedit_jax.weights.vit import LAYOUTS, export
from tools.benchmark.timing import say

# (depth, width, patch, side of the position table) of the encoders of REPA's and our configs.
ENCODERS = {
    "dinov2": (12, 768, 14, 37),
    "dinov1": (12, 768, 16, 14),
    "clip": (24, 1024, 14, 16),
    "mae": (24, 1024, 16, 14),
    "moco_v3": (24, 1024, 16, 14),
    "ijepa": (32, 1280, 14, 16),
}
# The text encoder of CLIP ViT-L/14.
TEXT = clip_text.Architecture(depth=12, width=768, heads=12, hidden=3072, vocabulary=49408, places=77, projection=768)


def space(config: ConfigDict) -> Space:
    """The space of a config's examples; if its data need options (such as data_dir) that of latents of 256 pixels, with
    ImageNet's classes or CLIP's tokens."""
    options = registry.options(registry.factory("data", config.data.name)).values()
    if all(option.default is not option.empty for option in options):
        return build.open_data(config).space
    shape = tuple(config.data.get("shape") or (32, 32, 4))
    if config.text_encoder is not None:
        return Space(shape, Conditions(np.zeros(TEXT.places, np.int32)))
    video = len(shape) == 4 and config.codec.name == "vae"  # frames are encoded as images
    return Space(shape, Conditions.labels(config.data.get("num_classes") or 1000), video)


def stored(config: ConfigDict, space: Space) -> dict[str, Any]:
    """The shapes of a batch of the config's data."""
    *sides, c = space.shape
    *frames, height, width = sides
    if config.data.get("cached"):
        raise ConfigError("config.data.cached: the shapes of stored features are not known without the data")
    moments = config.codec.name == "vae"
    one = {"moments": np.empty((*sides, 2 * c), np.float16)} if moments else {"x": np.empty(space.shape, np.float32)}
    one |= {"image": np.empty((*frames, 8 * height, 8 * width, 3), np.uint8)} if config.data.get("image") else {}
    one |= {"y": space.conditions.null}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((config.batch_size, *np.shape(x)), np.asarray(x).dtype), one)


def replace_files(config: ConfigDict, folder: Path, fill: Callable[..., np.ndarray] = np.zeros) -> None:
    """Write files into the folder for encoders without one, set them in the config, and unset its autoencoder."""
    for label, encoder in config.encoders.items():
        if encoder.get("file") is None:
            encoder.file = str(stand_in(encoder.name, folder, fill))
            say(f"config.encoders.{label}: a stand-in for its published weights")
    text = config.text_encoder
    if text is not None and text.get("file") is None:
        text.file = str(folder / "clip_text.safetensors")
        empty = jax.eval_shape(clip_text.network(TEXT).init, jax.random.key(0))
        filled = jax.tree.map(lambda leaf: fill(leaf.shape, leaf.dtype), empty)
        write_safetensors(Path(text.file), mapping.written(clip_text_files.entries(TEXT), filled))
        say("config.text_encoder: a stand-in for its published weights")
    if config.codec.get("vae"):
        config.codec.vae = None
        say("config.codec.vae: samples are not decoded")


def stand_in(name: str, folder: Path, fill: Callable[..., np.ndarray] = np.zeros) -> Path:
    """Write a file with the arrays of the published encoder `name`, each made by `fill(shape, dtype)`."""
    if name not in ENCODERS:
        raise ConfigError(f"config.encoders: the published size of {name!r} is unknown; give its file")
    kind = import_module(f"diversedit_jax.encoders.{name}").KIND
    depth, width, patch, side = ENCODERS[name]
    layout = kind.layouts[0]
    same = {field: getattr(kind, field) for field in ("class_token", "layer_scale", "final_norm", "activation", "eps")}
    size = {"depth": depth, "width": width, "heads": kind.heads[width], "hidden": 4 * width, "patch": patch}
    arch = vit.Architecture(**size, channels=3, side=side, pre_norm=bool(LAYOUTS[layout].pre_norm), **same)
    empty = jax.eval_shape(vit.network(arch).init, jax.random.key(0))
    arrays = export(jax.tree.map(lambda leaf: fill(leaf.shape, leaf.dtype), empty), layout, arch)
    path = folder / f"{name}.safetensors"
    write_safetensors(path, {f"{kind.entry}.{key}" if kind.entry else key: value for key, value in arrays.items()})
    return path
