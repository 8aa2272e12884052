"""Samples as pictures: grids of images, of frames of videos, of views of volumes; PNG and GIF files."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from diversedit_jax.runtime.files import replacing

Pixels = np.ndarray | jax.Array
SIZE, LINE = 12, 16  # of names in a grid: height of the font and of a line, in pixels
LINES = 4  # most lines of a name
STILL, MOVING = 4096, 1024  # pixels: about the largest side of a grid of frames or views, and of one that moves
STRIP = 16  # most frames of a video, or slices of a volume, side by side
FRAME = 120  # milliseconds: a GIF counts in hundredths of a second


class Picture(NamedTuple):
    """Samples in one picture. moving: a GIF of videos that all play at once; None for other samples."""

    still: UInt8[np.ndarray, "H W c"]
    moving: bytes | None = None


def picture(
    samples: UInt8[Pixels, "n *s c"],
    names: Sequence[str] | None = None,
    video: bool = False,
    columns: int | None = None,
) -> Picture:
    """The grid of samples of any shape, see `image_grid`. Of very many videos or volumes it has the first.

    Each video or volume has a row, with its name beside it: up to STRIP frames of a video; of a volume its views and
    slices, see `views`. Names and columns stand in the moving grid as in a grid of images.

    video: the first spatial axis is time.
    """
    samples = coloured(np.asarray(samples))
    if samples.ndim != 5:
        return Picture(image_grid(as_pictures(samples), columns, names))
    shown = samples[: max(1, STILL // (max(32, *samples.shape[1:3]) + 2))]
    strips = shown[:, spaced(shown.shape[1], STRIP)] if video else views(shown)
    n, k = strips.shape[:2]
    beside = names and [name for name in names[:n] for _ in range(k)]
    still = image_grid(strips.reshape(n * k, *strips.shape[2:]), k, beside)
    return Picture(still, _moving(samples, names, columns) if video else None)


def _moving(videos: UInt8[np.ndarray, "n f h w c"], names: Sequence[str] | None, columns: int | None) -> bytes:
    """A GIF of a grid of videos, without an end."""
    most = max(1, MOVING // (max(32, videos.shape[2]) + 2)) ** 2
    shown = videos[: max(columns, most - most % columns) if columns else most]
    grids = [image_grid(frame, columns, names and names[: len(shown)]) for frame in np.moveaxis(shown, 1, 0)]
    first, *others = (Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid) for grid in grids)
    file = io.BytesIO()
    first.save(file, format="gif", save_all=True, append_images=others, duration=FRAME, loop=0)
    return file.getvalue()


def views(volumes: UInt8[np.ndarray, "n d h w c"]) -> UInt8[np.ndarray, "n k H W c"]:
    """Pictures of volumes: three views, a white gap, and up to STRIP slices along the first axis.

    A view is the mean along an axis, made as bright as the volume. Pictures that are smaller than others have a white
    margin.
    """
    d, h, w = volumes.shape[1:4]
    means = [volumes.mean(axis=axis, keepdims=True) for axis in (1, 2, 3)]
    most = [np.maximum(x.max(axis=(1, 2, 3, 4), keepdims=True), 1) for x in (volumes, *means)]
    bright = [mean * np.minimum(most[0] / peak, 255 / peak) for mean, peak in zip(means, most[1:], strict=True)]
    seen = [np.round(view).astype(np.uint8).squeeze(axis) for axis, view in enumerate(bright, 1)]
    slices = volumes[:, spaced(d, STRIP)]
    pictures = [*seen, np.full_like(seen[0], 255), *np.moveaxis(slices, 1, 0)]
    height, width = max(h, d), max(w, h)

    def framed(one: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n H W c"]:
        margins = [((free // 2), free - free // 2) for free in (height - one.shape[1], width - one.shape[2])]
        return np.pad(one, ((0, 0), *margins, (0, 0)), constant_values=255)

    return np.stack([framed(one) for one in pictures], axis=1)


def spaced(count: int, most: int) -> np.ndarray:
    """The numbers 0 .. count - 1, or `most` of them at equal distances, with the first and the last."""
    return np.round(np.linspace(0, count - 1, min(count, most))).astype(int)


def image_grid(
    images: UInt8[Pixels, "n h w c"], columns: int | None = None, names: Sequence[str] | None = None
) -> UInt8[np.ndarray, "H W c"]:
    """Images with one channel or three, side by side on white, 2 pixels apart.

    columns: None: a square grid.
    names:   of the images, such as their classes or prompts. A name stands once above its column, or beside its row, if
             all images there have it; else above each image. A long one takes several lines.

    Small images are enlarged until they are 32 pixels high and wide, so that 8 x 8 digits can be read, and until names
    of up to 96 pixels fit.
    """
    images = np.asarray(images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    place = _place_of_names(names, columns) if names else None
    widest = math.ceil(max(map(_width, names))) if names else 0
    scale = math.ceil(max(32, min(widest, 96) if place in ("columns", "images") else 0) / min(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = images.shape
    beside = min(widest, 160) + 6 if place == "rows" else 0
    most = max(1, min(LINES, h // LINE)) if place == "rows" else LINES
    texts = [_wrapped(name, beside - 6 if beside else w, most) for name in names or ()]
    high = LINE * max(map(len, texts), default=0)
    rows, gap, line, above = (
        math.ceil(n / columns),
        2,
        *(high if place == kind else 0 for kind in ("images", "columns")),
    )
    grid = np.full((above + rows * (h + gap + line) + gap, beside + columns * (w + gap) + gap, c), 255, np.uint8)
    words = []  # (left, top, width, lines)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = above + line + gap + row * (h + gap + line), beside + gap + column * (w + gap)
        grid[top : top + h, left : left + w] = image
        if place == "images" or (place == "columns" and row == 0):
            words.append((left, top - LINE * len(texts[i]), w, texts[i]))
        elif place == "rows" and column == 0:
            words.append((gap, top + (h - LINE * len(texts[i])) // 2, beside - gap, texts[i]))
    return _written(grid, words) if words else grid


def _place_of_names(names: Sequence[str], columns: int) -> str:
    """Where names stand: `columns`, `rows` or `images`."""
    if columns > 1 and all(name == names[i - i % columns] for i, name in enumerate(names)):
        return "rows"
    above = len(names) > columns and all(name == names[i % columns] for i, name in enumerate(names))
    return "columns" if above else "images"


def _width(text: str) -> float:
    """The width of a text, in pixels."""
    return ImageFont.load_default(SIZE).getlength(text)


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """A text as lines of at most this width. What does not fit into `most` lines is cut."""
    if _width(text) <= width:
        return [text]
    lines: list[str] = []
    for word in text.split():
        if lines and _width(f"{lines[-1]} {word}") <= width - 4:  # apart from the text beside it
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, width) for line in lines]


def _cut(text: str, width: int) -> str:
    """A text of at most this width; the end of a longer one is left out."""
    if _width(text) <= width:
        return text
    return next((text[:k] + "…" for k in range(len(text), 0, -1) if _width(text[:k] + "…") <= width), "")


def _written(
    grid: UInt8[np.ndarray, "H W c"], words: Sequence[tuple[int, int, int, Sequence[str]]]
) -> UInt8[np.ndarray, "H W c"]:
    """The grid with words (left, top, width, lines), in the middle of their widths."""
    picture = Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(SIZE)
    for left, top, width, lines in words:
        for i, text in enumerate(lines):
            place = (left + width / 2, top + LINE * (i + 0.5))
            pen.text(place, text, fill=(0,) * grid.shape[-1], font=font, anchor="mm")
    return np.asarray(picture).reshape(grid.shape)


def as_pictures(samples: UInt8[Pixels, "n *s c"]) -> UInt8[np.ndarray, "n h w k"]:
    """Samples of any shape as images with one channel or three: the first of two, the first three of more.

    Frames of a video and slices of a volume stand side by side.
    """
    images = coloured(np.asarray(samples))
    images = images.reshape(len(images), *(1,) * (4 - images.ndim), *images.shape[1:])
    while images.ndim > 4:  # the first spatial axis goes along the width
        images = np.concatenate(list(np.moveaxis(images, 1, 0)), axis=-2)
    return images


def coloured(samples: UInt8[np.ndarray, "n *s c"]) -> UInt8[np.ndarray, "n *s k"]:
    """Samples with one channel or three: the first of two, the first three of more."""
    return samples[..., : 3 if samples.shape[-1] >= 3 else 1]


def png(image: UInt8[Pixels, "h w c"]) -> bytes:
    """A PNG of an image with one channel or three."""
    image, file = np.asarray(image), io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="png")
    return file.getvalue()


def save_png(path: str | os.PathLike, image: UInt8[Pixels, "h w c"]) -> None:
    """Write an image with one channel or three, whole or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(png(image))


def save(path: str | os.PathLike, picture: Picture) -> list[Path]:
    """Write a picture, whole or not at all: `path` as PNG and, if it moves, the same name as GIF. Returns the files.

    The PNG comes last, so that it shows that all is there.
    """
    path = Path(path)
    moving = [] if picture.moving is None else [path.with_suffix(".gif")]
    for place in moving:
        with replacing(place) as temporary:
            temporary.write_bytes(picture.moving)
    save_png(path, picture.still)
    return [path, *moving]
