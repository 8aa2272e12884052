"""Latents as LightningDiT keeps them (arXiv 2501.01423; the layout as ImgLatentDataset of that project reads it).

    *.safetensors      `latents` and `latents_flip` [n k h w], of images and of their mirror images; `labels` [n]
    latents_stats.pt   `mean` and `std` [1 k 1 1] of the latents, which are taken out of them

They are drawn latents, not moments: their standard deviation here is 0, so that every epoch sees the same draw, as it
does there. They are those of whatever autoencoder made them, VA-VAE mostly; `config.codec.scale` is 1.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

from diversedit_jax.data import Dataset, foreign_latents, local_path
from diversedit_jax.data.foreign_latents import Record
from diversedit_jax.errors import DataError
from diversedit_jax.weights.formats.weights_file import open_weights

STATS = "latents_stats.pt"


@dataclass(frozen=True)
class Reader:
    """index -> Record. ends: the number of images in the files up to each one."""

    files: tuple[Path, ...]
    ends: np.ndarray
    both: bool

    def __call__(self, index: int) -> Record:
        which = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[which - 1]) if which else 0)
        names = ("latents", "latents_flip") if self.both else ("latents",)
        with safetensors.safe_open(self.files[which], framework="numpy") as file:  # maps the file: reads the row alone
            drawn = np.stack([file.get_slice(name)[row : row + 1][0] for name in names]).astype(np.float32)
            label = int(file.get_slice("labels")[row : row + 1][0])
        return Record(np.concatenate([drawn, np.zeros_like(drawn)], axis=1), label)


def make(
    split: str, *, data_dir: str, num_classes: int = 1000, normalise: bool = True, mirror: bool = False
) -> Dataset:
    """The shards in `data_dir`, or in its subfolder `split` if there is one, in the order of their names.

    normalise: take mean and standard deviation of the channels out, as LightningDiT does; needs latents_stats.pt.
    mirror: each draw takes the mirror image with probability 1/2.
    """
    path = local_path("lightningdit", data_dir)
    path = foreign_latents.of_split("lightningdit", path, split)
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise DataError(f"lightningdit: {path} has no .safetensors files")
    counts = []
    for file in files:
        with open_weights(file) as weights:
            missing = [name for name in ("latents", "labels", *["latents_flip"] * mirror) if name not in weights]
            if missing:
                raise DataError(f"lightningdit: {file} has no array {missing[0]}, given: {', '.join(weights)}")
            counts.append(weights.shape("latents")[0])
    statistics = None
    if normalise:
        if not (path / STATS).is_file():
            raise DataError(f"lightningdit: {path / STATS} is missing; without it set normalise=False")
        with open_weights(path / STATS) as weights:
            statistics = tuple(np.asarray(weights.read(name), np.float32).reshape(-1) for name in ("mean", "std"))
    return foreign_latents.dataset(
        f"lightningdit: {path}",
        sum(counts),
        Reader(files, np.cumsum(counts), mirror),
        kind="std",
        num_classes=num_classes,
        mirror=mirror,
        scale=1.0,
        normalise=statistics,
    )
