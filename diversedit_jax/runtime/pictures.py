"""Images as bytes: grids, PNG files."""

import io
import math
import os
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diversedit_jax.runtime.files import replacing

Pixels = np.ndarray | jax.Array


def image_grid(images: UInt8[Pixels, "n h w c"], columns: int | None = None) -> UInt8[np.ndarray, "H W c"]:
    """Images with one channel or three, side by side on white, 2 pixels apart. columns: None: a square grid.

    Small images are enlarged until they are 32 pixels high and wide, so that 8 x 8 digits can be read.
    """
    images = np.asarray(images)
    scale = math.ceil(32 / min(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, gap = math.ceil(n / columns), 2
    grid = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        grid[top : top + h, left : left + w] = image
    return grid


def as_pictures(samples: UInt8[Pixels, "n *s c"]) -> UInt8[np.ndarray, "n h w k"]:
    """Samples of any shape as images with one channel or three: the first of two, the first three of more.

    Frames of a video and slices of a volume stand side by side.
    """
    images = np.asarray(samples)
    images = images.reshape(len(images), *(1,) * (4 - images.ndim), *images.shape[1:])
    while images.ndim > 4:  # the first spatial axis goes along the width
        images = np.concatenate(list(np.moveaxis(images, 1, 0)), axis=-2)
    return images[..., : 3 if images.shape[-1] >= 3 else 1]


def png(image: UInt8[Pixels, "h w c"]) -> bytes:
    """A PNG of an image with one channel or three."""
    image, file = np.asarray(image), io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
    return file.getvalue()


def save_png(path: str | os.PathLike, image: UInt8[Pixels, "h w c"]) -> None:
    """Write an image with one channel or three, whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(png(image))
