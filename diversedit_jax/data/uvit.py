"""Latents and text features as U-ViT prepares MS-COCO, and after it REPA, HASTE and others (github.com/baofff/U-ViT).

    train/{i}.npy          the latent of image i, float32 [2k h w]: means, then log variances or standard deviations
    train/{i}_{j}.npy      features of its caption j, float32 [n d]
    train/{i}.png          the crop of the image, where one has written it
    empty_context.npy      features of the empty text, here or in the folder of the split

The layout does not say what the second half of a latent is. So `kind` has no default.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, foreign_latents, local_path
from diversedit_jax.data.foreign_latents import Record, Stored
from diversedit_jax.data.image_collections import decode
from diversedit_jax.errors import ConfigError, DataError, check_machine
from diversedit_jax.reading import RegularFile, parse_npy
from diversedit_jax.registry import LARGEST, in_range

EMPTY = "empty_context.npy"
NAME = re.compile(r"(?P<image>0|[1-9]\d{0,8})(_(?P<caption>0|[1-9]\d{0,8}))?\.npy")
KINDS = "'logvar' for files of U-ViT, REPA and HASTE; 'std' for those of Self-Transcendence"


@dataclass(frozen=True)
class Contexts:
    """Features of captions, float32 of `shape` [n d], in the files of a folder. Called, it draws one of an example."""

    folder: Path
    shape: tuple[int, ...]

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """numbers: of the image, and of the caption."""
        return {"context": context(self.folder / "{}_{}.npy".format(*numbers), self.shape)}

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """Draw one of the captions, with equal probability. Only its file is read, if it is not the first one."""
        rest = dict(example)
        captions = rest.pop("captions", None)
        number = 0 if captions is None else rng.integers(len(captions))
        return rest | {"y": self.read(captions[number])} if number else rest


@dataclass(frozen=True)
class Captioned:
    """Examples by index: as of `latents`, but `y` are the features of the first caption: {"context": [n d]}.

    If there are several, `captions` int32 [m 2] are the numbers of the image and of each caption.
    numbers: of the captions, by the number of their image.
    """

    latents: Stored
    contexts: Contexts
    numbers: dict[int, list[int]]

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.latents[index]
        image = self.latents.read.images[index]
        pairs = np.array([(image, caption) for caption in self.numbers[image]], np.int32)
        example["y"] = self.contexts.read(pairs[0])
        return example | ({"captions": pairs} if len(pairs) > 1 else {})


@dataclass(frozen=True)
class Latents:
    """index -> Record of the image images[index]. pixels: also read its crop."""

    folder: Path
    images: tuple[int, ...]
    pixels: bool

    def __call__(self, index: int) -> Record:
        place = self.folder / f"{self.images[index]}.npy"
        crop = np.asarray(decode(content(place.with_suffix(".png")))) if self.pixels else None
        return Record(array(place)[None], 0, crop)


def content(file: Path) -> bytes:
    """The bytes of a file. DataError names it."""
    try:
        with RegularFile(file) as opened:
            return opened.read()
    except OSError as error:
        check_machine(error)
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def array(file: Path) -> np.ndarray:
    """The numbers in a file. DataError names it."""
    try:
        found = parse_npy(content(file))
        if found.dtype.kind != "f":
            raise ValueError(f"its numbers are {found.dtype}, wanted float32")
        return found.astype(np.float32)
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def context(file: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Text features, float32 [n d]. shape: what they must have. DataError names the file."""
    found = array(file)
    if found.ndim != 2 or found.shape != (shape or found.shape):
        raise DataError(f"{file} has shape {list(found.shape)}, wanted {list(shape) if shape else '[n d]'}")
    if not np.isfinite(found).all():
        raise DataError(f"{file} has text features that are not finite")
    return found


def make(split: str, *, data_dir: str, kind: str | None = None, scale: float = 0.18215, image: bool = False) -> Dataset:
    """The latents in the folder `split` of `data_dir`, and a random one of the captions of each at every draw.

    data_dir: the folder that U-ViT's scripts have filled. kind: what the second half of a latent is, `logvar` or `std`.
    scale: by which latents are multiplied. 0.18215 is that of Stable Diffusion; U-ViT's own COCO networks have 0.23010.
    image: also read the crops `{i}.png`, for encoders.

    There are no mirror images: captions name left and right. Raises ConfigError without `kind`, DataError for files
    that are missing, damaged or do not fit.
    """
    if kind is None:
        raise ConfigError(f"uvit: the files do not say their kind: set kind = {KINDS}")
    in_range("uvit: scale", scale, above=0, high=LARGEST)
    top = local_path("uvit", data_dir)
    folder = foreign_latents.of_split("uvit", top, split)
    images, captions = _listed(folder)
    for place in (folder / EMPTY, folder.parent / EMPTY):
        if place.exists():
            break
    else:
        raise DataError(f"uvit: neither {folder} nor the folder above has {EMPTY}, the features of the empty text")
    empty = context(place)
    stored = foreign_latents.dataset(
        f"uvit: {folder}", len(images), Latents(folder, images, image), num_classes=0, scale=scale, kind=kind
    )
    contexts = Contexts(folder, empty.shape)
    source = Captioned(stored.source, contexts, captions)
    source[0]  # a fault of all files shall end the program now
    space = Space(stored.space.shape, Conditions({"context": empty}))
    return Dataset(source, contexts, space, scale)


def _listed(folder: Path) -> tuple[tuple[int, ...], dict[int, list[int]]]:
    """The numbers of the images in a folder, and those of the captions of each, sorted."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError as error:
        check_machine(error)
        raise DataError(f"uvit: {folder} cannot be read: {error.strerror}") from error
    images, captions = [], {}
    for given in filter(None, map(NAME.fullmatch, names)):
        number = int(given["image"])
        if given["caption"] is None:
            images.append(number)
        else:
            captions.setdefault(number, []).append(int(given["caption"]))
    if not images:
        raise DataError(f"uvit: {folder} has no latents 0.npy, 1.npy, ...")
    if without := sorted(set(images) - captions.keys()):
        raise DataError(f"uvit: {folder}: {without[0]}.npy has no caption {without[0]}_0.npy; is the copy complete?")
    if alone := sorted(captions.keys() - set(images)):
        raise DataError(f"uvit: {folder}: captions of {alone[0]}.npy, which is missing; is the copy complete?")
    return tuple(sorted(images)), {number: sorted(found) for number, found in captions.items()}
