"""Train the small text encoder of the captioned digits, and write it as CLIP's are published.

    python -m tools.studies.caption_encoder diversedit_jax/data/captioned_digits_text

The folder gets vocab.json and merges.txt, byte pairs that make each word of the captions one token, and config.json and
model.safetensors, a text tower of two blocks in float16. It is trained with CLIP's loss (arXiv 2103.00020) against an
image encoder, on the training digits in the combinations that are not held out. Takes about a minute on 2 CPU cores.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from diversedit_jax.api import Params
from diversedit_jax.data import captioned_digits
from diversedit_jax.data.captioned_digits import CAPTIONS, COMBINATIONS, LENGTH, SHAPE, CaptionedDigits
from diversedit_jax.data.clip_tokenizer import END, START, WORD_END, open_tokenizer
from diversedit_jax.errors import ConfigError
from diversedit_jax.models import clip_text, vit
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import writable_folder
from diversedit_jax.weights.clip_text import entries
from diversedit_jax.weights.formats.weights_file import write_safetensors
from diversedit_jax.weights.mapping import written

WIDTH, HEADS, DEPTH, HIDDEN, PROJECTION = 64, 4, 2, 128, 32
IMAGES = vit.Architecture(DEPTH, WIDTH, HEADS, 2 * WIDTH, patch=4, channels=SHAPE[2], side=SHAPE[0] // 4)
STEPS, BATCH, RATE = 1000, 256, 2e-3
# Whether each caption says each attribute.
SAYS = np.array([[f"{{{name}[" in caption for name in captioned_digits.ATTRIBUTES] for caption in CAPTIONS])


def merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs to merge, the most frequent first, until each word is one token."""
    parts = [(*word[:-1], word[-1] + WORD_END) for word in words]
    found = []
    while pairs := Counter(pair for word in parts for pair in itertools.pairwise(word)):
        found.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        parts = [merged(word, found[-1]) for word in parts]
    return found


def merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Return the parts of a word, where each such pair has become one part."""
    found = []
    for part in word:
        together = found and (found[-1], part) == pair
        found = [*found[:-1], found[-1] + part] if together else [*found, part]
    return tuple(found)


def write_vocabulary(folder: Path) -> int:
    """Write the tokenizer of all captions in CLIP's order: bytes, bytes that end a word, merges, start, end."""
    from tokenizers.pre_tokenizers import ByteLevel

    texts = [text for attributes in COMBINATIONS for text in captioned_digits.captions(attributes)]
    words = sorted({word for text in texts for word in "".join(c if c.isalnum() else " " for c in text).split()})
    pairs, alphabet = merges(words), sorted(ByteLevel.alphabet())
    vocabulary = [*alphabet, *(f"{byte}{WORD_END}" for byte in alphabet), *map("".join, pairs), START, END]
    numbered = {word: number for number, word in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbered, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(vocabulary)


def architecture(vocabulary: int) -> clip_text.Architecture:
    """Return the text tower for so many tokens."""
    return clip_text.Architecture(
        DEPTH, WIDTH, HEADS, HIDDEN, vocabulary, places=LENGTH, projection=PROJECTION, end=vocabulary - 1
    )


def embedded(arch: clip_text.Architecture, params: Params, images: Array, ids: Array) -> tuple[Array, Array]:
    """Return the unit vectors of images and of texts, [b k] each."""
    tokens = vit.split(IMAGES, vit.network(IMAGES).apply(params["images"], images))
    found = tokens.class_token @ params["projection"], clip_text.network(arch).apply(params["text"], ids).projected
    return tuple(x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in found)


def train(arch: clip_text.Architecture, data: CaptionedDigits, steps: int) -> Params:
    """Return the trained parameters of both encoders.

    A caption belongs to every image of the batch that has the attributes that it says.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "images": jax.jit(vit.network(IMAGES).init)(keys[0]),
        "text": jax.jit(clip_text.network(arch).init)(keys[1]),
        "projection": jax.random.normal(keys[2], (WIDTH, PROJECTION)) / WIDTH**0.5,
        "scale": jnp.log(10.0),
    }
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, RATE, steps // 10, steps), weight_decay=0.01)

    def loss(params: Params, images: Array, ids: Array, match: Array) -> Array:
        found, texts = embedded(arch, params, images, ids)
        logits = jnp.exp(params["scale"]) * found @ texts.T
        both = [(logits, match), (logits.T, match.T)]
        wanted = [(rows, share / share.sum(axis=1, keepdims=True)) for rows, share in both]
        return sum(optax.softmax_cross_entropy(*pair).mean() for pair in wanted) / 2

    @jax.jit
    def step(params: Params, opt: Params, *batch: Array) -> tuple[Params, Params]:
        updates, opt = optimizer.update(jax.grad(loss)(params, *batch), opt, params)
        return optax.apply_updates(params, updates), opt

    opt, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        rows, kinds = rng.integers(len(data), size=BATCH), rng.integers(len(CAPTIONS), size=BATCH)
        examples, attributes = [data[int(row)] for row in rows], data.attributes[rows]
        images = np.stack([example["x"] for example in examples])
        ids = np.stack([example["captions"][kind] for example, kind in zip(examples, kinds, strict=True)])
        same = attributes[:, None] == attributes[None]  # [image caption attribute]
        match = (same | ~SAYS[kinds]).all(axis=2).astype(np.float32)
        params, opt = step(params, opt, images, ids, match)
    return params


def accuracy(arch: clip_text.Architecture, params: Params, data: CaptionedDigits) -> float:
    """Return the share of images that are nearest to the first caption of their combination, of all 320."""
    ids = data.tokens[..., 0, :].reshape(len(COMBINATIONS), -1)
    images, texts = jax.jit(partial(embedded, arch))(params, np.stack([data[i]["x"] for i in range(len(data))]), ids)
    nearest = COMBINATIONS[np.asarray(images @ texts.T).argmax(axis=1)]
    return float((nearest == data.attributes).all(axis=1).mean())


def save(folder: Path, arch: clip_text.Architecture, params: Params) -> None:
    """Write the text tower and its config under transformers' names."""
    arrays = {name: array.astype(np.float16) for name, array in written(entries(arch), params).items()}
    write_safetensors(folder / "model.safetensors", arrays)
    config = {
        "architectures": ["CLIPTextModelWithProjection"],
        "bos_token_id": arch.end - 1,
        "dtype": "float16",
        "eos_token_id": arch.end,
        "hidden_act": arch.activation,
        "hidden_size": arch.width,
        "intermediate_size": arch.hidden,
        "layer_norm_eps": arch.eps,
        "max_position_embeddings": arch.places,
        "model_type": "clip_text_model",
        "num_attention_heads": arch.heads,
        "num_hidden_layers": arch.depth,
        "pad_token_id": arch.end,
        "projection_dim": arch.projection,
        "vocab_size": arch.vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Train, write, and say how good it is."""
    if len(arguments) != 1:
        raise ConfigError("give the folder to write, such as runs/caption_encoder")
    folder = writable_folder(Path(arguments[0]).expanduser(), "FOLDER")
    arch = architecture(write_vocabulary(folder))
    words = open_tokenizer(folder, LENGTH)
    params = train(arch, captioned_digits.examples("train", words), STEPS)
    save(folder, arch, jax.device_get(params["text"]))
    seen, held_out = (accuracy(arch, params, captioned_digits.examples(split, words)) for split in ("test", "held_out"))
    print(f"{folder}: finds the caption of {seen:.1%} of the held-out digits, {held_out:.1%} in held-out combinations")


if __name__ == "__main__":
    cli.launch(main, arguments=True)
