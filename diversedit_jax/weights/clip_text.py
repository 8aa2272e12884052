"""CLIP's published text encoders as parameters of `models.clip_text`.

They are files and folders of transformers: CLIPTextModel and CLIPTextModelWithProjection, or a whole CLIPModel.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import clip_text
from diversedit_jax.models.clip_text import Architecture
from diversedit_jax.weights import hub, mapping
from diversedit_jax.weights.dit_names import LINEAR, SAME, Entry, heads_of, linear, norm
from diversedit_jax.weights.formats import weights_folder
from diversedit_jax.weights.mapping import Arrays, Shapes

TOP = "text_model"
TOKENS, PLACES = (f"{TOP}.embeddings.{name}_embedding.weight" for name in ("token", "position"))
PROJECTION = "text_projection.weight"
IGNORED = ("vision_model.", "visual_projection.", "logit_scale", f"{TOP}.embeddings.position_ids")
HEAD = 64  # width of a head of every published CLIP


class Release(NamedTuple):
    """A text encoder in a file. read: () -> parameters on the host."""

    arch: Architecture
    read: Callable[[], Params]


def entries(arch: Architecture) -> list[Entry]:
    """The arrays of an architecture."""
    found = [Entry(("token_embed",), None, TOKENS, SAME), Entry(("position",), None, PLACES, SAME)]
    found += norm(("norm",), f"{TOP}.final_layer_norm")
    if arch.projection:
        found.append(Entry(("projection", "kernel"), None, PROJECTION, LINEAR))
    turns = heads_of(arch.width, arch.heads, ())
    for i in range(arch.depth):
        block = f"{TOP}.encoder.layers.{i}"
        for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
            found += norm(("blocks", ours), f"{block}.{theirs}", i)
        for ours, theirs in (("proj", "self_attn.out_proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")):
            found += linear(("blocks", ours), f"{block}.{theirs}", i)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            found += linear(("blocks", "qkv"), f"{block}.self_attn.{name}", i, *turns, part)
    return found


def architecture(shapes: Shapes, config: dict[str, Any]) -> Architecture:
    """The architecture that the shapes of a file and its config.json show. config: {} without one."""
    config = config.get("text_config") or config
    if TOKENS not in shapes:
        raise ConfigError(f"clip_text: these are not its arrays ({mapping.few(shapes)}): wanted {TOKENS}")
    vocabulary, width = mapping.axes("clip_text", shapes, TOKENS, 2)
    layers = f"{TOP}.encoder.layers."
    return Architecture(
        depth=len({name.removeprefix(layers).split(".")[0] for name in shapes if name.startswith(layers)}),
        width=width,
        heads=config.get("num_attention_heads") or max(1, width // HEAD),
        hidden=mapping.axes("clip_text", shapes, f"{layers}0.mlp.fc1.weight", 2)[0],
        vocabulary=vocabulary,
        places=mapping.axes("clip_text", shapes, PLACES, 2)[0],
        projection=shapes[PROJECTION][0] if PROJECTION in shapes else 0,
        end=config.get("eos_token_id", clip_text.LARGEST_ID),
        activation=config.get("hidden_act", "quick_gelu"),
        eps=config.get("layer_norm_eps", 1e-5),
    )


def open_text_encoder(file: str | Path, dtype: str = "float32") -> Release:
    """The text encoder in a weight file or a folder of transformers; or named as on the hub.

    Names and shapes are checked now; parameters are read at `read()`.
    dtype: of `clip_text.network`.
    Raises WeightsError for what is no weight file and ConfigError, with the array's name, for what does not fit.
    """
    path = hub.local(file)
    with weights_folder.opened(path) as weights:
        shapes = Arrays(weights).shapes
    arch = architecture(shapes, weights_folder.config(path))
    target = jax.eval_shape(clip_text.network(arch, dtype).init, jax.random.key(0))
    mapping.check("clip_text", entries(arch), shapes, target, IGNORED)

    def read() -> Params:
        with weights_folder.opened(path) as weights:
            return mapping.fill("clip_text", entries(arch), Arrays(weights), target)

    return Release(arch, read)
