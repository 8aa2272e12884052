"""Latents as EDM2 prepares them (arXiv 2312.02696; github.com/NVlabs/edm2, training/encoders.py): img512-sd.zip.

A zip, or a folder, of dataset.json and 00000/img*.npy: means, then standard deviations, float32 [8 h w], of the
autoencoder fed with values in [0, 1], not [-1, 1]: what is trained on them cannot be mixed with what REPA's latents
give. EDM2 takes fixed means and deviations out of the channels, which is done here: `config.codec.scale` is 1.
"""

from dataclasses import dataclass

import numpy as np

from diversedit_jax.data import Dataset, foreign_latents, local_path
from diversedit_jax.data.foreign_latents import Files, Record

MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)  # of the raw latents, as EDM2 has them
FINAL_STD = 0.5  # in EDM2's space


@dataclass(frozen=True)
class Reader:
    """index -> Record."""

    latents: Files

    def __call__(self, index: int) -> Record:
        name = self.latents.names[index]
        return Record(foreign_latents.array(self.latents.read(name))[None], self.latents.labels.get(name, 0))


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

    num_classes: by default one more than the largest label, 0 without labels. mean, std: of the channels, taken out of
    them. final_std: of the latents that are trained on.
    """
    foreign_latents.no_mirror("edm2", mirror)
    foreign_latents.no_splits("edm2", split)
    path = local_path("edm2", data_dir)
    latents = foreign_latents.labelled("edm2", path, ".npy")
    return foreign_latents.dataset(
        f"edm2: {path}",
        len(latents.names),
        Reader(latents),
        kind="std",
        num_classes=foreign_latents.classes(latents.labels, num_classes),
        mirror=False,
        scale=1.0,
        normalise=(np.float32(mean), np.float32(std) / np.float32(final_std)),
    )
