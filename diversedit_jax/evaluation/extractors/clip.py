"""CLIP (arXiv 2103.00020) as feature network: for the CLIP score of images and captions (arXiv 2104.08718)."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from diversedit_jax.api import Condition, Params
from diversedit_jax.encoders import CLIP_MEAN, CLIP_STD, normalise
from diversedit_jax.encoders.clip import KIND
from diversedit_jax.errors import ConfigError
from diversedit_jax.evaluation.extractors import Extractor, Features, digest
from diversedit_jax.models import bicubic, clip_text, vit
from diversedit_jax.registry import in_range, one_of
from diversedit_jax.weights import hub, mapping
from diversedit_jax.weights.clip_text import PROJECTION, open_text_encoder
from diversedit_jax.weights.formats import weights_folder
from diversedit_jax.weights.mapping import Arrays
from diversedit_jax.weights.vit import open_encoder

VISUAL_PROJECTION = "visual_projection.weight"


def make(*, file: str, heads: int | None = None) -> Extractor:
    """The class token after the last norm, projected; and how well an image matches its caption (`matches`).

    file: a whole CLIPModel of transformers, image and text: a folder, a file, or a name on the hub. Papers mostly take
        ViT-L/14, hf:openai/clip-vit-large-patch14.
    heads: as in `encoders.dinov2`.

    Captions are token ids by CLIP's tokenizer. Arithmetic is float32.
    """
    in_range("clip: heads", 1 if heads is None else heads, 1)
    path = hub.local(file)
    config = weights_folder.config(path).get("vision_config") or {}
    kind = KIND._replace(layouts=("hf_clip",), final_norm=True, eps=config.get("layer_norm_eps", KIND.eps))
    kind = kind._replace(activation=config.get("hidden_act", KIND.activation))
    one_of("clip: hidden_act in config.json", kind.activation, vit.ACTIVATIONS)
    image, text = open_encoder(kind, file, heads or config.get("num_attention_heads")), open_text_encoder(file)
    with weights_folder.opened(path) as weights:
        shapes = Arrays(weights).shapes
    wanted = mapping.axes("clip", shapes, PROJECTION, 2)[0], image.arch.width
    if (given := mapping.axes("clip", shapes, VISUAL_PROJECTION, 2)) != wanted:
        raise ConfigError(f"clip: {VISUAL_PROJECTION} has shape {list(given)}, wanted {list(wanted)}")
    see, understand = vit.network(image.arch).apply, clip_text.network(text.arch).apply
    side = image.arch.side * image.arch.patch

    @cache
    def read() -> Params:
        with weights_folder.opened(path) as weights:
            projection = np.float32(Arrays(weights)[VISUAL_PROJECTION]).T
        return {"image": image.read(), "projection": projection, "text": text.read()}

    def apply(weights: Params, images: Array) -> Features:
        if images.ndim != 4 or images.shape[-1] != image.arch.channels:
            raise ConfigError(f"clip: wanted images [b h w {image.arch.channels}], given {list(images.shape)}")
        x = normalise(resized(images, side), CLIP_MEAN, CLIP_STD)
        with jax.default_matmul_precision("highest"):
            tokens = see(weights["image"], x)
            return Features(vit.split(image.arch, tokens).class_token @ weights["projection"])

    def match(weights: Params, features: Features, y: Int[Array, "b n"]) -> Float[Array, " b"]:
        with jax.default_matmul_precision("highest"):
            return matches(features.pool, understand(weights["text"], y).projected)

    about = {"weights": {"name": Path(file).name, "digest": digest(read())}}
    about["resize"] = f"bicubic of Pillow, the shorter side to {side}, cropped in the centre"
    return Extractor("clip", read, apply, about, match=match, check=partial(check, text.arch))


def matches(images: Float[Array, "b d"], texts: Float[Array, "b d"]) -> Float[Array, " b"]:
    """100 max(0, cos) of the embeddings of images and of their captions."""
    norms = jnp.linalg.norm(images, axis=1) * jnp.linalg.norm(texts, axis=1)
    return 100 * jax.nn.relu(jnp.sum(images * texts, axis=1) / norms)


def resized(images: UInt8[Array | np.ndarray, "b h w c"], side: int) -> Float[Array, "b side side c"]:
    """Images as CLIP takes them: bicubic, the shorter side to `side`, cropped in the centre. Values are 0 .. 255.

    As in Pillow, values are rounded to 256 levels after each of the two axes, halves up.
    """
    x, short = jnp.asarray(images, jnp.float32), min(images.shape[1:3])
    for axis in (2, 1):
        given = x.shape[axis]
        weights = bicubic.weights(given, side * given // short, antialias=True)
        x = jnp.moveaxis(jnp.tensordot(weights, x, (1, axis), precision="highest"), 0, axis)
        x = jnp.clip(jnp.floor(x + 0.5), 0, 255)
    top, left = ((length - side) // 2 for length in x.shape[1:3])
    return x[:, top : top + side, left : left + side]


def check(arch: clip_text.Architecture, y: Condition) -> None:
    """Raise ConfigError for conditions y [b ...] that are not token ids of this text encoder."""
    if isinstance(y, Mapping) or not np.issubdtype(y.dtype, np.integer) or y.ndim != 2:
        given = "labels" if not isinstance(y, Mapping) and y.ndim == 1 else "stored features"
        raise ConfigError(f"clip: the conditions are {given}; its score compares images with token ids of captions")
    end = arch.vocabulary - 1 if arch.end == clip_text.LARGEST_ID else arch.end
    if y.shape[1] > arch.places or y.min() < 0 or y.max() >= arch.vocabulary or not (y == end).any(axis=1).all():
        raise ConfigError(
            f"clip: the captions are {y.shape[1]} tokens with ids {y.min()} .. {y.max()}, but it takes {arch.places} or"
            f" fewer with ids 0 .. {arch.vocabulary - 1} and the end {end}: another tokenizer made them"
        )
