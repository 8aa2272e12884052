"""Small images with captions, and a run of a tiny MMDiT on them: `tests.captioned:make_data` is a slot of `data`."""

import numpy as np
from ml_collections import ConfigDict

from diversedit_jax.api import Conditions, Space
from diversedit_jax.config import slot
from diversedit_jax.configs import default
from diversedit_jax.data import Dataset, clip_tokenizer
from tests import ROOT

SHAPE = (8, 8, 3)
LENGTH, START, END = 16, 97, 98  # of the texts of tests/data/clip_tokenizer: places, and the largest two ids
ENCODER, TOKENIZER = (ROOT / "tests" / "data" / name for name in ("clip_text", "clip_tokenizer"))


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


def config(**changes) -> ConfigDict:
    """The config of a tiny MMDiT on these images; `changes` by dotted key, `__` for a dot."""
    config = default.get_config()
    config.update({"total_steps": 4, "batch_size": 16, "log_every": 1, "ema_decay": 0.0})
    config.data = slot("data", "tests.captioned:make_data")
    config.codec = slot("codecs", "pixels")
    files = {"file": str(ENCODER), "tokenizer": str(TOKENIZER)}
    config.text_encoder = slot("encoders", "clip_text", dtype="float32", **files)
    config.model = slot("models", "mmdit", depth=4, width=32, heads=2, patch=2)
    config.checkpoint.update({"every": 2, "keep_every": 0})
    config.sampler.update({"solver": "euler", "steps": 2, "batch_size": 16})
    config.samples.update({"every": 0, "num": 0})
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config
