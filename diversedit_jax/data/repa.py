"""Latents and images as REPA prepares them, and after it SRA and others (github.com/sihyun-yu/REPA, dataset.py).

    vae-sd/dataset.json               {"labels": [[file, class], ...]}
    vae-sd/00000/img-mean-std-*.npy   means, then standard deviations, float32 [8 h w]
    images/00000/img*.png             the crops, in the same order

The autoencoder is Stable Diffusion's; images had values in [-1, 1]. There are no mirror images. Either folder may be a
zip of the same name.
"""

from dataclasses import dataclass

import numpy as np

from diversedit_jax.data import Dataset, foreign_latents, image_collections, local_path
from diversedit_jax.data.foreign_latents import Files, Record
from diversedit_jax.errors import DataError


@dataclass(frozen=True)
class Reader:
    """index -> Record."""

    latents: Files
    images: image_collections.ImageFiles | None

    def __call__(self, index: int) -> Record:
        name = self.latents.names[index]
        image = None if self.images is None else np.asarray(image_collections.decode(self.images.read(index)))
        return Record(foreign_latents.array(self.latents.read(name))[None], self.latents.labels.get(name, 0), image)


def make(
    split: str,
    *,
    data_dir: str,
    num_classes: int | None = None,
    kind: str = "std",
    mirror: bool = False,
    image: bool = False,
) -> Dataset:
    """The latents in `data_dir`, which has no splits.

    num_classes: by default one more than the largest label, 0 without labels. kind: `std` as REPA writes them, `logvar`
    for sets in this layout that hold log variances. image: also read the crops, for encoders.
    """
    foreign_latents.no_mirror("repa", mirror)
    foreign_latents.no_splits("repa", split)
    path = local_path("repa", data_dir)
    latents = foreign_latents.labelled("repa", _either(path / "vae-sd"), ".npy")
    images = None
    if image:
        images = image_collections.open_images(_either(path / "images"), unconditional=True)
        if len(images) != len(latents.names):
            raise DataError(f"repa: {path} has {len(latents.names)} latents, but {len(images)} images")
    return foreign_latents.dataset(
        f"repa: {path}",
        len(latents.names),
        Reader(latents, images),
        kind=kind,
        num_classes=foreign_latents.classes(latents.labels, num_classes),
        mirror=False,
        scale=0.18215,
    )


def _either(folder):
    zipped = folder.with_name(f"{folder.name}.zip")
    return zipped if zipped.is_file() and not folder.is_dir() else folder
