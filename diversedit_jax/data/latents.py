"""Image latents on disk, as tools/prepare_latents.py computes them with the Stable Diffusion VAE.

A directory is a tfds data set in array_record files, read without TensorFlow:

    dataset_info.json, features.json             names, splits, shard lengths
    <name>-<split>.array_record-00000-of-00016   the shards

Every record has the first two features, and may have the others:

    moments   Tensor(shape=(2, h, w, 2c), dtype=float16, encoding='bytes'). Axis 0: the image, its mirror image.
              Last axis: c means, then c standard deviations, of the latent distribution before scaling.
    label     Scalar of an integer type, or ClassLabel: 0 .. num_classes - 1.
    image     Image(shape=(H, W, k), encoding_format='png' or 'jpeg'), or Tensor of this shape and uint8: the pixels
              of the image, not mirrored.
    key       Text: the name of the image. Training does not read it.
    features/NAME, token/NAME
              Tensor(shape=(2, n, d)) and Tensor(shape=(2, d)), dtype=float16, encoding='bytes': patch tokens and class
              token of the encoder NAME. Axis 0 as in `moments`.

latents.json beside them is optional. It says how they were made: `format`, `moments` (mean_std), `shape` [h w c],
`classes` (names by label; null: none, every label is 0), `vae` with its `scale`, `resolution`, `crop`, checksums of the
shards. tools/prepare_latents.py writes it last: a directory with plan.json and without latents.json is unfinished.

An ImageNet image of 256x256 takes 32 KiB (h = w = 32, c = 4, both versions), its pixels about 100 KB as PNG, its patch
tokens of DINOv2-B 768 KiB. So run encoders on the pixels instead of storing tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, local_path
from diversedit_jax.data.image_collections import decode
from diversedit_jax.data.tfds_folder import first_line, open_folder, parsed, records_of
from diversedit_jax.errors import ConfigError, DataError, check_machine
from diversedit_jax.reading import read_json

ABOUT = "latents.json"
FORMAT, MOMENTS = 1, "mean_std"
CACHED = {"features": 3, "token": 2}  # kind of a cached encoder output -> axes of the stored array


def open_source(data_dir: Path, split: str) -> tuple[tfds.core.DatasetInfo, Any]:
    """The metadata of the data set in `data_dir`, and its records by index, as stored."""
    if not data_dir.is_dir():
        raise DataError(f"latents: data_dir {data_dir} is not a directory of this machine")
    try:
        builder = open_folder(data_dir)
    except Exception as error:
        check_machine(error)
        unfinished = (data_dir / "plan.json").exists() and not (data_dir / ABOUT).exists()
        why = "its preparation is not finished" if unfinished else first_line(error)
        raise DataError(f"latents: {data_dir} is not a tfds dataset: {why}") from error
    try:
        records = records_of(builder, split)
    except Exception as error:
        check_machine(error)
        raise DataError(f"latents: cannot open split {split!r} of {data_dir}: {first_line(error)}") from error
    if len(records) == 0:
        raise DataError(f"latents: split {split!r} of {data_dir} is empty")
    return builder.info, records


def about(data_dir: Path) -> dict[str, Any]:
    """The content of latents.json, {} if there is none. DataError if its format is not the one that is read here."""
    try:
        found = read_json(data_dir / ABOUT)
        if not isinstance(found, dict):
            raise ValueError("wanted a JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        check_machine(error)
        raise DataError(f"latents: {data_dir / ABOUT} cannot be read: {error}") from error
    for name, wanted in (("format", FORMAT), ("moments", MOMENTS)):
        if found.get(name) != wanted:
            raise DataError(f"latents: {data_dir / ABOUT} says {name} = {found.get(name)!r}, wanted {wanted!r}")
    return found


def check(
    features: Mapping[str, Any], shape: tuple[int, int, int], num_classes: int, image: bool, cached: tuple[str, ...]
) -> None:
    """Raise DataError if the metadata do not fit the options of `make`. None in a wanted shape: any fixed size."""
    h, w, c = shape
    wanted = {"moments": ((2, h, w, 2 * c), np.float16), "label": ((), np.integer)}
    wanted |= {"image": ((None, None, None), np.uint8)} if image else {}
    wanted |= {name: ((2, *[None] * (CACHED[name.partition("/")[0]] - 1)), np.float16) for name in cached}
    for name, (wanted_shape, wanted_dtype) in wanted.items():
        if name not in features:
            raise DataError(f"latents: no feature {name!r}, given: {', '.join(sorted(features))}")
        given = features[name]
        sizes = zip(given.shape, wanted_shape, strict=False)
        if len(given.shape) != len(wanted_shape) or any(n is None or m not in (None, n) for n, m in sizes):
            raise DataError(f"latents: {name} has shape {given.shape}, wanted {wanted_shape} for latents of {shape}")
        if not np.issubdtype(given.np_dtype, wanted_dtype):
            raise DataError(f"latents: {name} is {np.dtype(given.np_dtype)}, wanted {wanted_dtype.__name__}")
        as_bytes = type(given) is tfds.features.Tensor and given._encoding == tfds.features.Encoding.BYTES
        as_image = type(given) is tfds.features.Image and given.shape[-1] in (1, 3)
        if given.shape and not as_image and not as_bytes:
            wanted_kind = "Tensor(encoding='bytes') or Image with 1 or 3 channels"
            raise DataError(f"latents: {name} is stored as {given}; wanted {wanted_kind}")
    given_classes = getattr(features["label"], "num_classes", None)
    if given_classes is not None and given_classes > num_classes:
        raise DataError(f"latents: the data have {given_classes} classes, num_classes is {num_classes}")


def decoded(feature: Any, value: Any) -> Any:
    """A stored value as a number, or as an array without a copy of its bytes. tfds takes several times as long."""
    if not value.bytes_list.value:
        (number,) = value.int64_list.value
        return number
    (content,) = value.bytes_list.value
    if type(feature) is tfds.features.Image:  # tfds would let Pillow decode all that it can
        return np.asarray(decode(content))[..., : feature.shape[-1]]
    return np.frombuffer(content, feature.np_dtype).reshape(feature.shape)


@dataclass(frozen=True)
class Moments:
    """Examples by index: `moments` float16 [h w 2c], `y`, and the other features that are read.

    name: of the split, for errors. features: those that are read, by name.
    shards: (file, number of its records in this split, number of its records before them).
    both: keep the versions for the image and its mirror image, on a leading axis, in all but `image` and `y`.
    """

    records: Any
    name: str
    num_classes: int
    features: Mapping[str, Any]
    shards: tuple[tuple[str, int, int], ...]
    both: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        try:
            return self._example(self.records[index])
        except Exception as error:
            check_machine(error)
            message = str(error) if isinstance(error, DataError) else first_line(error)
            raise DataError(f"{self.name}, record {index} ({self.place(index)}): {message}") from error

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray | np.int32]]:
        """Many examples, read together. Its errors do not name the record; those of `[index]` do."""
        return [self._example(record) for record in self.records.__getitems__(list(indices))]

    def place(self, index: int) -> str:
        """The file of a record, and its number there."""
        for file, count, skipped in self.shards:
            if index < count:
                return f"{Path(file).name}, number {index + skipped}"
            index -= count
        return "beyond the last shard"

    def _example(self, record: bytes) -> dict[str, np.ndarray | np.int32]:
        stored = parsed(record)
        example = {name: decoded(feature, stored[name]) for name, feature in self.features.items()}
        example["y"] = label_of(example.pop("label"), self.num_classes)
        return example if self.both else chosen(example, False)


def label_of(label: int, num_classes: int) -> np.int32:
    """The label, if it is one of the classes; without classes it must be 0."""
    if not 0 <= label < max(num_classes, 1):
        raise DataError(f"label {label} is not in 0 .. {max(num_classes, 1) - 1}")
    return np.int32(label)


def told_classes(name: str, num_classes: int | None) -> int:
    """The number of classes of data that do not say it. ConfigError if the config does not either."""
    if num_classes is None:
        raise ConfigError(f"{name}: the data do not say how many classes they have: set num_classes (ImageNet: 1000)")
    return num_classes


def chosen(example: dict, mirror: bool) -> dict:
    """One version of an example that has both: of the image, or of its mirror image."""
    parts = {name: value[int(mirror)] for name, value in example.items() if name not in ("y", "image")}
    if "image" in example:
        parts["image"] = example["image"][:, ::-1] if mirror else example["image"]
    return {**parts, "y": example["y"]}


def flip(example: dict, rng: np.random.Generator) -> dict:
    """Draw one version of an example that has both, with equal probability."""
    return chosen(example, rng.random() < 0.5)


def make(
    split: str,
    *,
    data_dir: str,
    shape: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    mirror: bool = False,
    image: bool = False,
    cached: tuple[str, ...] = (),
) -> Dataset:
    """The latents in `data_dir`: `moments` float16 [h w 2c] and `y` int32.

    data_dir: what tools.prepare_latents has written.
    shape: of the latents, h w c; by default as stored.
    num_classes: by default the number of stored class names; needed if the data have none.
    mirror: each draw takes the mirror image with probability 1/2, in every feature.
    image: also read `image`, uint8 [H W k], which encoders run on.
    cached: also read stored encoder outputs, float16: `features/NAME` [n d] or `token/NAME` [d].

    Raises DataError if the directory, the split, a feature or a label is not as the module describes.
    """
    for name in cached:
        if name.partition("/")[0] not in CACHED or not name.partition("/")[2]:
            raise ConfigError(f"latents: cached = {name!r}: wanted features/NAME or token/NAME")
    folder = local_path("latents", data_dir)
    info, records = open_source(folder, split)
    says = about(folder)
    try:
        features = dict(info.features.items())
        if shape is None:
            if len(getattr(features.get("moments"), "shape", ())) != 4:
                raise DataError(f"latents: no feature 'moments' [2 h w 2c], given: {', '.join(sorted(features))}")
            _, h, w, channels = features["moments"].shape
            shape = h, w, channels // 2
        if num_classes is None:
            num_classes = getattr(features.get("label"), "num_classes", None)
            num_classes = len(says["classes"] or ()) if "classes" in says else num_classes
            num_classes = told_classes(f"latents: {folder}", num_classes)
        names = says.get("classes") or getattr(features.get("label"), "names", None) or ()
        check(features, tuple(shape), num_classes, image, cached)
        read = {name: features[name] for name in ("moments", "label", *["image"] * image, *cached)}
        files = tfds.core.data_sources.base.file_instructions(info, split)
        shards = tuple((one.filename, one.examples_in_shard if one.take == -1 else one.take, one.skip) for one in files)
        source = Moments(records, f"{data_dir}, split {split}", num_classes, read, shards, mirror)
        space = Space(tuple(shape), Conditions.labels(num_classes, names))
        scale = says.get("vae", {}).get("scale")
        if scale is not None and not 0 < float(scale) < np.inf:
            raise ValueError(f"the scale of the autoencoder is {scale}")
        return Dataset(source, flip if mirror else None, space, scale)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # tfds has metadata of many kinds
        check_machine(error)
        raise DataError(f"latents: the metadata of {folder} cannot be used: {first_line(error)}") from error
