"""Latents as the official MeanFlow keeps them (arXiv 2505.13447): a .pt file for each image.

Each holds a dict: `image`, means, then standard deviations, float32 [8 h w], and `label`. There are no mirror images.
Reading a file needs no torch and runs no code in it. The folder is listed once, at the beginning.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diversedit_jax.data import Dataset, foreign_latents, label, local_path
from diversedit_jax.data.foreign_latents import Record
from diversedit_jax.data.latents import told_classes
from diversedit_jax.errors import DataError
from diversedit_jax.weights.formats.weights_file import open_weights


@dataclass(frozen=True)
class Reader:
    """index -> Record."""

    folder: Path
    names: tuple[str, ...]

    def __call__(self, index: int) -> Record:
        with open_weights(self.folder / self.names[index]) as file:
            if not isinstance(file.tree, dict) or not {"image", "label"} <= file.tree.keys():
                raise DataError(f"{self.names[index]}: wanted a dict with `image` and `label`")
            found = file["label"] if "label" in file else file.tree["label"]
            return Record(np.asarray(file["image"], np.float32)[None], label(found))


def make(
    split: str, *, data_dir: str, num_classes: int | None = None, kind: str = "std", mirror: bool = False
) -> Dataset:
    """The .pt files in `data_dir`, or in its subfolder `split` if there is one, in the order of their names.

    data_dir: a folder of .pt files. mirror: draw mirror images with probability 1/2.
    num_classes: needed, since no file says it.
    kind: `std` as published, `logvar` for sets in this layout that hold log variances.
    """
    foreign_latents.no_mirror("meanflow_pt", mirror)
    path = foreign_latents.of_split("meanflow_pt", local_path("meanflow_pt", data_dir), split)
    if not path.is_dir():
        raise DataError(f"meanflow_pt: {path} is not a folder of .pt files")
    classes = told_classes(f"meanflow_pt: {path}", num_classes)
    found = (Path(folder, name) for folder, _, names in os.walk(path) for name in names if name.endswith(".pt"))
    names = tuple(sorted(str(name.relative_to(path)) for name in found))
    return foreign_latents.dataset(
        f"meanflow_pt: {path}", len(names), Reader(path, names), num_classes=classes, scale=0.18215, kind=kind
    )
