"""CLIP's text encoder, frozen: token ids to the condition of a text-to-image network (arXiv 2103.00020).

Features are those of all tokens after the last norm. Tokens behind the end of a text are ordinary tokens, as
text-to-image models read them. `hf:openai/clip-vit-large-patch14` is the one of REPA, U-ViT and Stable Diffusion 1.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from diversedit_jax.api import Condition, Params
from diversedit_jax.data import clip_tokenizer
from diversedit_jax.encoders import TextEncoder
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import clip_text
from diversedit_jax.weights import hub
from diversedit_jax.weights.clip_text import open_text_encoder


def make(*, file: str, tokenizer: str | None = None, pooled: bool = False, dtype: str = "bfloat16") -> TextEncoder:
    """A text encoder of CLIP. A condition is {"context": [b n d], "mask": [b n]}, and "pooled": [b k] if wanted.

    file: its weights, a folder of transformers or a file; also a name on the hub.
    tokenizer: the folder of vocab.json and merges.txt, for prompts. None: where the weights are.
    pooled: also give the text as one vector: projected, or that of the end token if the file has no projection.
    dtype: of the matmuls in the blocks, `float32` or `bfloat16`.

    The mask is true for the tokens of the text, with its start and its end. The network does not read it: losses do.
    """
    release = open_text_encoder(file, dtype)
    arch = release.arch
    network = clip_text.network(arch, dtype)

    def apply(frozen: Params, ids: Int[Array, "b n"]) -> Condition:
        text = jax.lax.stop_gradient(network.apply(frozen, ids))
        found = {"context": text.tokens, "mask": jnp.arange(ids.shape[1]) <= clip_text.end_of(ids, arch.end)[:, None]}
        return found | ({"pooled": text.pooled if text.projected is None else text.projected} if pooled else {})

    def folder() -> Path:
        if tokenizer is not None:
            return hub.folder(tokenizer, clip_tokenizer.FILES)
        place = hub.local(file)
        return place.parent if place.is_file() else place

    def check(known: Mapping[str, object]) -> None:
        if known["vocabulary"] > arch.vocabulary or known["length"] > arch.places:
            raise ConfigError(
                f"clip_text: the data have texts of {known['length']} tokens out of {known['vocabulary']}, the encoder "
                f"{file} takes {arch.places} out of {arch.vocabulary}: their tokens are for another encoder"
            )
        if clip_tokenizer.holds(folder()) and (digest := clip_tokenizer.digest(folder())) != known["sha256"]:
            raise ConfigError(
                f"clip_text: the data were made with another tokenizer ({known['sha256'][:12]}) than that of "
                f"{tokenizer or file} ({digest[:12]})"
            )

    def opened(length: int = arch.places) -> clip_tokenizer.Tokenizer:
        made = clip_tokenizer.open_tokenizer(folder(), length)
        if made.size > arch.vocabulary:
            raise ConfigError(f"clip_text: the tokenizer has {made.size} tokens, the encoder {arch.vocabulary}")
        return made

    return TextEncoder(cache(release.read), apply, cache(opened), check)
