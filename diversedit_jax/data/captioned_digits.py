"""Handwritten digits with captions, 16 x 16 pixels: text and images that need no download.

Each digit of `data.digits` is drawn in a colour, in a size and in a corner of a black canvas: 320 combinations of these
attributes. No training image has one of the 64 that are held out, but any three of the attributes occur together.
So samples of held-out combinations show whether a network composes what it has learned.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, digits
from diversedit_jax.data.clip_tokenizer import Tokenizer, digest, open_tokenizer
from diversedit_jax.registry import one_of

SHAPE = (16, 16, 3)
SIDES = (8, 12)  # of a small and a large digit
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Both names of each value of an attribute.
ATTRIBUTES = {
    "digit": tuple(zip(WORDS, "0123456789", strict=True)),
    "colour": (("red",) * 2, ("yellow",) * 2, ("green",) * 2, ("blue",) * 2),
    "size": (("small", "little"), ("large", "big")),
    "place": tuple(
        (f"{row} {column}", f"{other} {column}")
        for row, other in (("top", "upper"), ("bottom", "lower"))
        for column in ("left", "right")
    ),
}
COLOURS = np.float32([(1, 0.2, 0.2), (1, 0.9, 0.2), (0.2, 0.9, 0.3), (0.3, 0.5, 1)])  # RGB in [0, 1]
CAPTIONS = (
    "a {size[0]} {colour[0]} {digit[0]} at the {place[0]}",
    "{place[0]}: a {colour[0]} {digit[1]}, {size[0]}",
    "a {colour[0]} {digit[1]}, {size[1]}, {place[1]}",
    "the {size[1]} {digit[0]} at the {place[1]} is {colour[0]}",
    "{size[0]} {colour[0]} {digit[1]} in the {place[0]} corner",
    "at the {place[1]}, a {digit[0]} that is {size[0]} and {colour[0]}",
    "number {digit[1]} in {colour[0]}, {size[1]}, at the {place[0]}",
    "{colour[0]} digit {digit[0]}, {size[1]}, {place[0]}",
    "a {colour[0]} {digit[0]}",  # the others say every attribute
)
FULL = len(CAPTIONS) - 1  # captions that say every attribute
# Indices of the attributes' values, in the order of ATTRIBUTES, [320 4].
COMBINATIONS = np.stack(np.unravel_index(np.arange(320), [len(names) for names in ATTRIBUTES.values()]), axis=-1)
SPLITS = {"train": ("train", False), "test": ("test", False), "held_out": ("test", True)}  # digits, combinations

# CLIP's tokenizer and text encoder for these captions, by tools/studies/caption_encoder.py.
TEXT_ENCODER = Path(__file__).parent / "captioned_digits_text"
LENGTH = 16  # places of a caption


def held_out(attributes: Int[np.ndarray, "*n 4"]) -> Bool[np.ndarray, "*n"]:
    """Whether these combinations are held out: 64 of 320.

    Of the combinations that share two values at most a quarter is held out; of those that share three, never all.
    """
    return attributes @ np.array([1, 1, 2, 1]) % 5 == 0


def captions(attributes: Int[np.ndarray, " 4"]) -> list[str]:
    """The captions of a combination. The first is `a small red seven at the top left`."""
    chosen = zip(ATTRIBUTES.items(), attributes, strict=True)
    names = {attribute: values[value] for (attribute, values), value in chosen}
    return [caption.format(**names) for caption in CAPTIONS]


def brightness(split: str, data_dir: str | Path | None = None) -> tuple[list[np.ndarray], Int[np.ndarray, " n"]]:
    """The brightness in [0, 1] of the digits in each size, float32 [n s s], and the digits; see `digits.levels`."""
    levels, labels = digits.levels(split, data_dir)
    small = levels[..., 0].astype(np.float32) / digits.MAX_LEVEL
    return [resized(small, side) for side in SIDES], labels


def resized(images: Float[np.ndarray, "n h h"], side: int) -> Float[np.ndarray, "n s s"]:
    """Square images in [0, 1] of another side, by Pillow's bicubic filter."""
    identity = Image.fromarray(np.eye(images.shape[1], dtype=np.float32))
    rows = np.asarray(identity.resize((images.shape[1], side), Image.Resampling.BICUBIC))  # [s h]
    return np.clip(np.einsum("sh,nhw,tw->nst", rows, images, rows), 0, 1)


@dataclass(frozen=True)
class CaptionedDigits:
    """Examples by index: `x` float32 [16 16 3] in [-1, 1], `captions` int32 [m n], and `y`, the first of them.

    digits:     brightness in each size, [k s s].
    rows:       of `digits`, for each example.
    attributes: of each example, in the order of ATTRIBUTES.
    tokens:     ids of the captions of each combination.
    """

    digits: list[np.ndarray]
    rows: Int[np.ndarray, " e"]
    attributes: Int[np.ndarray, "e 4"]
    tokens: Int[np.ndarray, "10 4 2 4 m n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        _, colour, size, place = attributes = self.attributes[index]
        digit = self.digits[size][self.rows[index]]
        side, free = SIDES[size], SHAPE[0] - SIDES[size]
        top, left = (free * int(part) for part in divmod(place, 2))
        x = np.full(SHAPE, -1, np.float32)
        x[top : top + side, left : left + side] += 2 * digit[..., None] * COLOURS[colour]
        ids = self.tokens[tuple(attributes)]
        return {"x": x, "y": ids[0], "captions": ids}


def draw_caption(example: dict, rng: np.random.Generator) -> dict:
    """Draw one of the captions as `y`, and leave out the others."""
    rest = {name: value for name, value in example.items() if name != "captions"}
    return rest | {"y": rng.choice(example["captions"])}


def examples(split: str, words: Tokenizer, data_dir: str | Path | None = None) -> CaptionedDigits:
    """The examples of a split, see `make`. words: the tokenizer of the captions."""
    one_of("captioned_digits: split", split, SPLITS)
    source, wanted = SPLITS[split]
    drawings, labels = brightness(source, data_dir)
    fits = (labels[:, None] == COMBINATIONS[:, 0]) & (held_out(COMBINATIONS) == wanted)
    rows, numbers = np.nonzero(fits)
    order = np.random.default_rng(0).permutation(len(rows))
    texts = [text for attributes in COMBINATIONS for text in captions(attributes)]
    tokens = words(texts).ids.reshape(*map(len, ATTRIBUTES.values()), len(CAPTIONS), -1)
    return CaptionedDigits(drawings, rows[order], COMBINATIONS[numbers[order]], tokens)


def make(split: str, *, data_dir: str | None = None) -> Dataset:
    """The captioned digits: `x` float32 [16 16 3] in [-1, 1], and `y` int32 [16], the ids of a caption.

    `train`: 1,437 digits, each in the 25 or 26 combinations that are not held out. Of 360 other digits, `test` has the
    same combinations, and `held_out` the others. Each split is in a random order, always the same.
    data_dir: as in `data.digits`.
    """
    words = open_tokenizer(TEXT_ENCODER, LENGTH)
    space = Space(SHAPE, Conditions(words([""]).ids[0]))
    text = {"sha256": digest(TEXT_ENCODER), "vocabulary": words.size, "length": LENGTH}
    return Dataset(examples(split, words, data_dir), draw_caption, space, text=text)
