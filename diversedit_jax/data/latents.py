"""Image latents on disk: what the Stable Diffusion VAE says of every image, computed once by tools/prepare_latents.py.

The directory is a tfds dataset, file format array_record, read without TensorFlow:

    dataset_info.json, features.json             names, splits, shard lengths
    <name>-<split>.array_record-00000-of-00016   the shards

and every record has two features, and may have more that alignment to an image encoder needs:

    moments   Tensor(shape=(2, h, w, 2c), dtype=float16, encoding='bytes'). Axis 0: the image, its mirror image.
              Last axis: c means, then c standard deviations, of the latent distribution before scaling.
    label     Scalar of an integer type, or ClassLabel: 0 .. num_classes - 1.
    image     Image(shape=(H, W, k), encoding_format='png' or 'jpeg'), or Tensor of this shape and uint8: the pixels
              that `moments` were computed from, not mirrored.
    key       Text: the name of the image. Training does not read it.
    features/NAME, token/NAME
              Tensor(shape=(2, n, d)) and Tensor(shape=(2, d)), dtype=float16, encoding='bytes': the patch tokens and
              the class token of the encoder NAME, computed before. Axis 0 as in `moments`.

Beside them, latents.json says how they were made: `format`, `moments` (mean_std), `shape` [h w c], `classes` (names by
label; null: none, every label is 0), `vae` with its `scale`, `resolution`, `crop`, checksums of the shards. It may be
missing; tools/prepare_latents.py writes it last, so that a set that has its plan instead is not finished.

ImageNet at 256x256 has h = w = 32 and c = 4: 32 KiB for an image with its mirror image, before compression. Its pixels
are about 100 KB as PNG; the patch tokens of DINOv2-B are 768 KiB, which is why encoders rather run on the pixels.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, local_path
from diversedit_jax.errors import ConfigError, DataError

ABOUT = "latents.json"
FORMAT, MOMENTS = 1, "mean_std"


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message: array_record raises some with no message at all."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def open_source(data_dir: Path, split: str) -> tuple[tfds.core.DatasetInfo, Any]:
    """The metadata of the dataset in `data_dir` and its records by index, as they are stored."""
    if not data_dir.is_dir():
        raise DataError(f"latents: data_dir {data_dir} is not a directory of this machine")
    try:
        builder = tfds.builder_from_directory(str(data_dir))
    except Exception as error:
        unfinished = (data_dir / "plan.json").exists() and not (data_dir / ABOUT).exists()
        left = "its preparation is not finished" if unfinished else first_line(error)
        raise DataError(f"latents: {data_dir} is not a tfds dataset: {left}") from error
    try:
        whole = builder.info.splits[split].num_examples
        records = builder.as_data_source(split, deserialize_method=RAW) if whole else []
    except Exception as error:
        raise DataError(f"latents: cannot open split {split!r} of {data_dir}: {first_line(error)}") from error
    if len(records) == 0:
        raise DataError(f"latents: split {split!r} of {data_dir} is empty")
    return builder.info, records


def about(data_dir: Path) -> dict[str, Any]:
    """What latents.json says, {} where there is none; DataError for latents of another kind than are read here."""
    try:
        found = json.loads((data_dir / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"latents: {data_dir / ABOUT} cannot be read: {error}") from error
    for name, wanted in (("format", FORMAT), ("moments", MOMENTS)):
        if found.get(name) != wanted:
            raise DataError(f"latents: {data_dir / ABOUT} says {name} = {found.get(name)!r}, wanted {wanted!r}")
    return found


def parsed(record: bytes) -> Mapping[str, Any]:
    """The features of a record, as they are stored."""
    return tf_example_pb2.Example.FromString(record).features.feature


RAW = tfds.decode.DeserializeMethod.RAW_BYTES
CACHED = {"features": 3, "token": 2}  # what an encoder computed before: number of axes as stored


def check(
    info: tfds.core.DatasetInfo,
    shape: tuple[int, int, int],
    num_classes: int,
    image: bool = False,
    cached: tuple[str, ...] = (),
) -> None:
    """Raise DataError if the features are not those of `shape` [h w c] and `num_classes`, as far as metadata tell.

    image, cached: the options of `make`.
    """
    h, w, c = shape
    wanted = {"moments": ((2, h, w, 2 * c), np.float16), "label": ((), np.integer)}
    wanted |= {"image": ((None, None, None), np.uint8)} if image else {}
    wanted |= {name: ((2, *[None] * (CACHED[name.partition("/")[0]] - 1)), np.float16) for name in cached}
    for name, (wanted_shape, wanted_dtype) in wanted.items():
        if name not in info.features:
            raise DataError(f"latents: no feature {name!r}, given: {', '.join(sorted(info.features))}")
        given = info.features[name]
        # None: any length, but the same in all records
        fits = [
            size is not None and want in (None, size) for size, want in zip(given.shape, wanted_shape, strict=False)
        ]
        if len(given.shape) != len(wanted_shape) or not all(fits):
            raise DataError(f"latents: {name} has shape {given.shape}, wanted {wanted_shape} for latents of {shape}")
        if not np.issubdtype(given.np_dtype, wanted_dtype):
            raise DataError(f"latents: {name} is {np.dtype(given.np_dtype)}, wanted {wanted_dtype.__name__}")
    given_classes = getattr(info.features["label"], "num_classes", None)
    if given_classes is not None and given_classes > num_classes:
        raise DataError(f"latents: the data have {given_classes} classes, num_classes is {num_classes}")


def decoder(name: str, feature: Any) -> Callable[[Any], Any]:
    """How a stored value of a feature becomes an array, or a number; those of bytes are not copied.

    This is several times as fast as tfds, which takes every feature of a record through lists of numbers.
    """
    kind = type(feature).__name__
    if kind == "Image":
        return partial(_image, feature)
    if kind == "Tensor" and feature._encoding == tfds.features.Encoding.BYTES:
        return partial(_tensor, feature.np_dtype, feature.shape)
    if feature.shape == () and np.issubdtype(feature.np_dtype, np.integer):
        return _integer
    raise DataError(f"latents: {name} is stored as {feature}; wanted Tensor(encoding='bytes'), Image, or an integer")


def _tensor(dtype: Any, shape: tuple[int, ...], value: Any) -> np.ndarray:
    (content,) = value.bytes_list.value
    return np.frombuffer(content, dtype).reshape(shape)


def _image(feature: Any, value: Any) -> np.ndarray:
    (content,) = value.bytes_list.value
    return feature.decode_example_np(content)


def _integer(value: Any) -> int:
    (number,) = value.int64_list.value
    return number


@dataclass(frozen=True)
class Moments:
    """Examples by index: `moments` float16 [h w 2c], `y`, and what else is wanted.

    decoders: of the features that are read. shards: (file, number of its records that are read, of those before them).
    both: of all but `image` and `y`, the version of the image and that of its mirror image, on a leading axis.
    """

    records: Any
    name: str  # for messages
    num_classes: int
    decoders: Mapping[str, Callable[[Any], Any]]
    shards: tuple[tuple[str, int, int], ...]
    both: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        try:
            return self._example(self.records[index])
        except Exception as error:
            message = str(error) if isinstance(error, DataError) else first_line(error)
            raise DataError(f"{self.name}, record {index} ({self.place(index)}): {message}") from error

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray | np.int32]]:
        """Many examples, read together. What one of them raises does not say which: `[index]` does."""
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
        example = {name: decode(stored[name]) for name, decode in self.decoders.items()}
        label = example.pop("label")
        if not 0 <= label < max(self.num_classes, 1):
            raise DataError(f"label {label} is not in 0 .. {max(self.num_classes, 1) - 1}")
        example["y"] = np.int32(label)
        return example if self.both else chosen(example, False)


def chosen(example: dict, mirror: bool) -> dict:
    """The example of the image, or of its mirror image, out of both."""
    parts = {name: value[int(mirror)] for name, value in example.items() if name not in ("y", "image")}
    if "image" in example:
        parts["image"] = example["image"][:, ::-1] if mirror else example["image"]
    return {**parts, "y": example["y"]}


def flip(example: dict, rng: np.random.Generator) -> dict:
    """The example of the image or, with probability 1/2, of its mirror image, out of both."""
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

    shape: of the latents, h w c; by default as the data have it.
    num_classes: by default those that the data name, 0 where they say that there are none, and 1000 where they are
    silent.
    mirror: each draw takes the mirror image with probability 1/2, in all that is read.
    image: also read `image`, uint8 [H W k], which encoders run on.
    cached: also read these, computed before, such as `features/dinov2` [n d] and `token/dinov2` [d], float16.

    Raises DataError if the directory, the split, a feature or a label is not as the module describes.
    """
    for name in cached:
        if name.partition("/")[0] not in CACHED or not name.partition("/")[2]:
            raise ConfigError(f"latents: cached = {name!r}: wanted features/NAME or token/NAME")
    folder = local_path("latents", data_dir)
    info, records = open_source(folder, split)
    says = about(folder)
    shape = _shape(info) if shape is None else tuple(shape)
    num_classes = _classes(info, says) if num_classes is None else num_classes
    check(info, shape, num_classes, image, cached)
    wanted = ("moments", "label", *(["image"] if image else []), *cached)
    decoders = {name: decoder(name, info.features[name]) for name in wanted}
    files = tfds.core.data_sources.base.file_instructions(info, split)
    shards = tuple(
        (file.filename, file.examples_in_shard if file.take == -1 else file.take, file.skip) for file in files
    )
    source = Moments(records, f"{data_dir}, split {split}", num_classes, decoders, shards, mirror)
    space = Space(shape, Conditions.labels(num_classes))
    return Dataset(source, flip if mirror else None, space, says.get("vae", {}).get("scale"))


def _shape(info: tfds.core.DatasetInfo) -> tuple[int, int, int]:
    if "moments" not in info.features or len(info.features["moments"].shape) != 4:
        raise DataError(f"latents: no feature 'moments' [2 h w 2c], given: {', '.join(sorted(info.features))}")
    _, h, w, channels = info.features["moments"].shape
    return h, w, channels // 2


def _classes(info: tfds.core.DatasetInfo, says: Mapping[str, Any]) -> int:
    if "classes" in says:
        return len(says["classes"] or ())
    label = dict(info.features.items()).get("label")
    return getattr(label, "num_classes", None) or 1000
