"""Latents as EDM2 prepares them (arXiv 2312.02696; github.com/NVlabs/edm2, training/encoders.py): img512-sd.zip.

A zip, or a folder, of dataset.json and 00000/img*.npy: means, then standard deviations, float32 [8 h w]. The
autoencoder saw values in [0, 1], not [-1, 1], so these latents cannot be mixed with REPA's. As EDM2 does, `make`
standardises the channels: `config.codec.scale` is 1.
"""

import numpy as np

from diversedit_jax.data import Dataset, foreign_latents, local_path
from diversedit_jax.registry import in_range

MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # of the raw latents, as EDM2 has them
FINAL_STD = 0.5  # in EDM2's space


def make(
    split: str,
    *,
    data_dir: str,
    num_classes: int | None = None,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    final_std: float = FINAL_STD,
    mirror: bool = False,
) -> Dataset:
    """The latents in the zip or folder `data_dir`, which has no splits.

    data_dir: the zip, or a folder with its content. mirror: draw mirror images with probability 1/2.
    num_classes: by default one more than the largest label, 0 without labels. mean, std: of the stored channels.
    final_std: of the latents to train on.
    """
    in_range("edm2: std", min(std, default=0), above=0)
    in_range("edm2: final_std", final_std, above=0)
    foreign_latents.no_mirror("edm2", mirror)
    foreign_latents.no_splits("edm2", split)
    path = local_path("edm2", data_dir)
    reader = foreign_latents.npy_files("edm2", path)
    normalise = np.float32(mean), np.float32(std) / np.float32(final_std)
    options = {"num_classes": reader.classes(num_classes), "scale": 1.0, "normalise": normalise}
    return foreign_latents.dataset(f"edm2: {path}", len(reader.names), reader, **options)
