"""Latents and images as REPA prepares them, and after it SRA and others (github.com/sihyun-yu/REPA, dataset.py).

    vae-sd/dataset.json               {"labels": [[file, class], ...]}
    vae-sd/00000/img-mean-std-*.npy   means, then standard deviations, float32 [8 h w]
    images/00000/img*.png             the crops, in the same order

The autoencoder is Stable Diffusion's, fed with values in [-1, 1]. There are no mirror images. Either folder may be a
zip of the same name.
"""

from dataclasses import replace
from pathlib import Path

from diversedit_jax.data import Dataset, foreign_latents, image_collections, local_path
from diversedit_jax.errors import DataError


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

    data_dir: a folder as REPA writes it. mirror: draw mirror images with probability 1/2.
    num_classes: by default one more than the largest label, 0 without labels. kind: `std` as REPA writes them, `logvar`
    for sets in this layout that hold log variances. image: also read the crops, for encoders.
    """
    foreign_latents.no_mirror("repa", mirror)
    foreign_latents.no_splits("repa", split)
    path = local_path("repa", data_dir)
    reader = foreign_latents.npy_files("repa", _folder_or_zip(path / "vae-sd"))
    if image:
        images = image_collections.open_images(_folder_or_zip(path / "images"), unconditional=True)
        if len(images) != len(reader.names):
            raise DataError(f"repa: {path} has {len(reader.names)} latents, but {len(images)} images")
        reader = replace(reader, images=images)
    options = {"num_classes": reader.classes(num_classes), "scale": 0.18215, "kind": kind}
    return foreign_latents.dataset(f"repa: {path}", len(reader.names), reader, **options)


def _folder_or_zip(folder: Path) -> Path:
    zipped = folder.with_name(f"{folder.name}.zip")
    return zipped if zipped.is_file() and not folder.is_dir() else folder
