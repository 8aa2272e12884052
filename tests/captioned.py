"""Small images with captions, and a run of a tiny MMDiT on them: `tests.captioned:make_data` is a slot of `data`."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import default
from diversedit_jax.data import Dataset, clip_tokenizer
from diversedit_jax.models import clip_text
from diversedit_jax.weights import mapping
from diversedit_jax.weights.clip_text import entries
from tests import ROOT

SHAPE = (8, 8, 3)
LENGTH, START, END = 16, 533, 534  # of the texts of tests/data/clip_tokenizer: places, and the largest two ids
TOKENIZER = ROOT / "tests" / "data" / "clip_tokenizer"


@cache
def encoder(width: int = 16) -> Path:
    """A folder with a small random text encoder for TOKENIZER, in the published layout. It goes when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="diversedit-text-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_encoder(folder, width=width)


def write_encoder(folder: Path, seed: int = 0, width: int = 16) -> Path:
    """A random text encoder with its tokenizer in a folder."""
    arch = clip_text.Architecture(
        depth=1, width=width, heads=2, hidden=32, vocabulary=END + 1, places=LENGTH, projection=8
    )
    params = jax.device_get(clip_text.network(arch).init(jax.random.key(seed)))
    params["token_embed"] = 50 * params["token_embed"]  # so that texts differ
    save_file(mapping.written(entries(arch), params), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": arch.heads}))
    for name in clip_tokenizer.FILES:
        shutil.copy(TOKENIZER / name, folder)
    return folder


def ids(*words: int) -> np.ndarray:
    """The token ids of a text, int32 [16]: start, words, end, and ends behind it."""
    return np.array([START, *words, *[END] * (LENGTH - 1 - len(words))], np.int32)


def draw(example: dict, rng: np.random.Generator) -> dict:
    """Choose one caption."""
    captions = example["captions"]
    return {"x": example["x"], "y": captions[rng.integers(len(captions))]}


def make_data(split: str, *, size: int = 64, captions: int = 3) -> Dataset:
    """Images of one colour with noise, float32 [8 8 3]. Their captions name the colour by one of eight words.

    captions: of each image. They have 1 to 12 words. With several, training and analysis draw one at each visit.
    """
    rng = np.random.default_rng(["train", "test"].index(split))

    def example(kind: int) -> dict:
        colour = np.array([kind & 1, kind & 2, kind & 4], bool) - 0.5
        x = (colour + 0.1 * rng.standard_normal(SHAPE)).astype(np.float32)
        found = np.stack([ids(kind, *rng.integers(8, START, rng.integers(12))) for _ in range(captions)])
        return {"x": x, "y": found[0]} | ({"captions": found} if captions > 1 else {})

    source = [example(number % 8) for number in range(size)]
    text = {"sha256": clip_tokenizer.digest(TOKENIZER), "vocabulary": END + 1, "length": LENGTH}
    return Dataset(source, draw if captions > 1 else None, Space(SHAPE, Conditions(ids())), text=text)


def make_latents(split: str, *, image: bool = False) -> Dataset:
    """Four examples like those of latents of 256 pixels, with texts."""
    example = {"moments": np.ones((32, 32, 8), np.float16), "y": ids(1, 2)}
    example |= {"image": np.zeros((256, 256, 3), np.uint8)} if image else {}
    return Dataset([example] * 4, None, Space((32, 32, 4), Conditions(ids())))


def config(**changes) -> ConfigDict:
    """The config of a tiny MMDiT on these images; `changes` by dotted key, `__` for a dot."""
    config = default.get_config()
    config.update({"total_steps": 4, "batch_size": 16, "log_every": 1, "ema_decay": 0.0})
    config.data = slot("data", "tests.captioned:make_data")
    config.codec = slot("codecs", "pixels")
    config.text_encoder = slot("encoders", "clip_text", dtype="float32", file=str(encoder()))
    config.model = slot("models", "mmdit", depth=4, width=32, heads=2, patch=2)
    config.checkpoint.update({"every": 2, "keep_every": 0})
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 16})
    config.samples.update({"every": 0, "num": 0})
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config
