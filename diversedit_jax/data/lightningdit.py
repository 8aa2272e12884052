"""Latents as LightningDiT keeps them (arXiv 2501.01423; the layout as ImgLatentDataset of that project reads it).

    *.safetensors      `latents` and `latents_flip` [n k h w], of images and of their mirror images; `labels` [n]
    latents_stats.pt   `mean` and `std` [1 k 1 1], which standardise the latents

The latents are draws, not moments: their standard deviation here is 0, so every epoch sees the same draw, as there.
Any autoencoder may have made them, mostly VA-VAE; `config.codec.scale` is 1.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

from diversedit_jax.data import Dataset, foreign_latents, label, local_path
from diversedit_jax.data.foreign_latents import Record
from diversedit_jax.errors import DataError
from diversedit_jax.weights.formats.weights_file import WeightsFile, open_weights

STATS = "latents_stats.pt"


@dataclass(frozen=True)
class Reader:
    """index -> Record. ends: how many images the files hold, up to and with each one."""

    files: tuple[Path, ...]
    ends: np.ndarray
    both: bool

    def __call__(self, index: int) -> Record:
        which = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[which - 1]) if which else 0)
        names = ("latents", "latents_flip") if self.both else ("latents",)
        with safetensors.safe_open(self.files[which], framework="numpy") as file:  # reads only this row
            drawn = np.stack([file.get_slice(name)[row : row + 1][0] for name in names]).astype(np.float32)
            found = label(file.get_slice("labels")[row : row + 1][0])
        return Record(np.concatenate([drawn, np.zeros_like(drawn)], axis=1), found)


def _shape(file: Path, weights: WeightsFile, mirror: bool) -> tuple[int, ...]:
    """The shape of a file's latents. DataError if its arrays do not fit each other."""
    names = ("latents", "labels", *["latents_flip"] * mirror)
    if missing := [name for name in names if name not in weights]:
        raise DataError(f"lightningdit: {file} has no array {missing[0]}, given: {', '.join(weights)}")
    shapes = {name: weights.shapes[name] for name in names}
    latents, labels = shapes["latents"], shapes["labels"]
    if len(latents) != 4 or labels != latents[:1] or shapes.get("latents_flip", latents) != latents:
        raise DataError(f"lightningdit: {file} has shapes {shapes}: wanted latents [n k h w] and labels [n]")
    return latents


def _statistics(file: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [k] of the latents."""
    with open_weights(file) as weights:
        mean, std = (np.asarray(weights[name], np.float32).reshape(-1) for name in ("mean", "std"))
    if not mean.size == std.size == channels or not (np.isfinite(mean).all() and ((std > 0) & (std < np.inf)).all()):
        raise DataError(f"lightningdit: {file}: wanted a finite mean and a standard deviation of {channels} channels")
    return mean, std


def make(
    split: str, *, data_dir: str, num_classes: int | None = None, normalise: bool = True, mirror: bool = False
) -> Dataset:
    """The shards in `data_dir`, or in its subfolder `split` if there is one, in the order of their names.

    data_dir: a folder of .safetensors files.
    num_classes: by default one more than the largest label. mirror: draw mirror images with probability 1/2.
    normalise: standardise the channels as LightningDiT does; needs latents_stats.pt.
    """
    path = foreign_latents.of_split("lightningdit", local_path("lightningdit", data_dir), split)
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise DataError(f"lightningdit: {path} has no .safetensors files")
    shapes, largest = [], -1
    for file in files:
        with open_weights(file) as weights:
            shapes.append(_shape(file, weights, mirror))
            try:
                largest = max([largest, *map(label, weights["labels"].tolist())])
            except (TypeError, ValueError) as error:
                raise DataError(f"lightningdit: {file}: labels: {error}") from error
    statistics = None
    if normalise:
        if not (path / STATS).is_file():
            raise DataError(f"lightningdit: {path / STATS} is missing; without it set normalise=False")
        statistics = _statistics(path / STATS, shapes[0][1])
    options = {
        "num_classes": largest + 1 if num_classes is None else num_classes,
        "scale": 1.0,
        "mirror": mirror,
        "normalise": statistics,
    }
    counts = [shape[0] for shape in shapes]
    reader = Reader(files, np.cumsum(counts), mirror)
    return foreign_latents.dataset(f"lightningdit: {path}", sum(counts), reader, **options)
