"""A whole small CLIP as transformers writes it: a random image tower, and the text tower of a folder."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from diversedit_jax.models import vit
from diversedit_jax.weights import vit as published
from tests import DATA

ARCH = vit.Architecture(2, 24, 3, 40, 4, 3, 4, pre_norm=True, activation="quick_gelu", eps=1e-5)
SIDE = 16  # pixels: 4 patches of 4
TEXT = DATA / "clip_text"


def arrays(text: Path = TEXT) -> dict[str, np.ndarray]:
    """The arrays, by the names of transformers. text: the folder of the text tower."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(vit.network(ARCH).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape, dtype=np.float32), shapes)
    found = published.export(params, "hf_clip", ARCH) | load_file(text / "model.safetensors")
    width = len(found["text_projection.weight"])
    found["visual_projection.weight"] = rng.standard_normal((width, ARCH.width), dtype=np.float32)
    return found | {"logit_scale": np.ones((), np.float32)}


def leave(folder: Path, text: Path = TEXT, vision: dict | None = None, **changes: np.ndarray | None) -> Path:
    """The folder, with its files.

    text: the folder of the text tower. vision: changes to `vision_config`. changes: to the arrays; None leaves one out.
    """
    folder.mkdir()
    held = {name: array for name, array in (arrays(text) | changes).items() if array is not None}
    save_file(held, folder / "model.safetensors")
    known = {"hidden_size": ARCH.width, "intermediate_size": ARCH.hidden, "num_hidden_layers": ARCH.depth}
    known |= {"num_attention_heads": ARCH.heads, "patch_size": ARCH.patch, "image_size": SIDE}
    known |= {"hidden_act": ARCH.activation, "layer_norm_eps": ARCH.eps}
    config = {"model_type": "clip", "projection_dim": len(held.get("visual_projection.weight", ()))}
    config |= {"vision_config": known | (vision or {}), "text_config": json.loads((text / "config.json").read_text())}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
