"""Latents of images or videos on disk, as tools/prepare_latents.py computes them with the Stable Diffusion VAE.

A directory is a tfds data set in array_record files, read without TensorFlow:

    dataset_info.json, features.json             names, splits, shard lengths
    <name>-<split>.array_record-00000-of-00016   the shards

Every record has `moments`, and either `label` or `tokens`. It may have the others:

    moments   Tensor(shape=(2, h, w, 2c), dtype=float16, encoding='bytes'). Axis 0: the image, its mirror image.
              Last axis: c means, then c standard deviations, of the latent distribution before scaling. Of a clip
              of f frames: shape (2, f, h, w, 2c).
    label     Scalar of an integer type, or ClassLabel: 0 .. num_classes - 1.
    tokens    Tensor(shape=(None, n), dtype=int32, encoding='bytes'): token ids of the captions of the image.
    text      Sequence(Text): these captions. Training does not read them.
    image     Image(shape=(H, W, k), encoding_format='png' or 'jpeg'), or Tensor of this shape and uint8: the pixels
              of the image, not mirrored. Of a clip: Sequence(Image(...), length=f).
    key       Text: the name of the image. Training does not read it.
    features/NAME, token/NAME
              Tensor(shape=(2, n, d)) and Tensor(shape=(2, d)), dtype=float16, encoding='bytes': patch tokens and class
              token of the encoder NAME. Axis 0 as in `moments`.

latents.json beside them is optional. It says how they were made: `format`, `moments` (mean_std), `shape` [h w c],
`classes` (names by label; null: none, every label is 0), `vae` with its `scale`, `resolution`, `crop`, checksums of the
shards. `video` (true) says that the first axis of `shape` [f h w c] is time; without it, it is the depth of a volume.
With `tokens` the file is required, and its `captions` say what made them: `sha256` of the tokenizer's content, number
of words in the `vocabulary`, `length` n, ids of the `start` and of the `end`, which also fills the places behind it.
tools/prepare_latents.py writes it last: a directory with plan.json and without latents.json is unfinished.

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
from diversedit_jax.registry import INT32

ABOUT = "latents.json"
FORMAT, MOMENTS = 1, "mean_std"
MAX_LENGTH = 1 << 16  # tokens of a caption: a damaged number would ask for gigabytes
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
    features: Mapping[str, Any],
    shape: tuple[int, ...],
    condition: tuple[str, tuple, type],
    image: bool,
    cached: tuple[str, ...],
) -> None:
    """Raise DataError if the metadata do not fit the options of `make`.

    condition: name, shape and type of the feature. In a wanted shape, None is any fixed size, and ... one that varies.
    """
    *sides, channels = shape
    wanted = {"moments": ((2, *sides, 2 * channels), np.float16), condition[0]: condition[1:]}
    wanted |= {"image": ((None,) * len(shape), np.uint8)} if image else {}
    wanted |= {name: ((2, *[None] * (CACHED[name.partition("/")[0]] - 1)), np.float16) for name in cached}
    for name, (wanted_shape, wanted_dtype) in wanted.items():
        if name not in features:
            raise DataError(f"latents: no feature {name!r}, given: {', '.join(sorted(features))}")
        given = features[name]
        sizes = [(n, m) for n, m in zip(given.shape, wanted_shape, strict=False) if m is not ...]
        if len(given.shape) != len(wanted_shape) or any(n is None or m not in (None, n) for n, m in sizes):
            shown = str(wanted_shape).replace("Ellipsis", "any")
            raise DataError(f"latents: {name} has shape {given.shape}, wanted {shown} for latents of {shape}")
        if not np.issubdtype(given.np_dtype, wanted_dtype):
            raise DataError(f"latents: {name} is {np.dtype(given.np_dtype)}, wanted {wanted_dtype.__name__}")
        as_bytes = type(given) is tfds.features.Tensor and given._encoding == tfds.features.Encoding.BYTES
        kind = given.feature if type(given) is tfds.features.Sequence else given
        as_image = type(kind) is tfds.features.Image and kind.shape[-1] in (1, 3)
        if given.shape and not as_image and not as_bytes:
            wanted_kind = "Tensor(encoding='bytes') or Image with 1 or 3 channels"
            raise DataError(f"latents: {name} is stored as {given}; wanted {wanted_kind}")


def decoded(feature: Any, value: Any) -> Any:
    """A stored value as a number, or as an array without a copy of its bytes. tfds takes several times as long."""
    if not value.bytes_list.value:
        (number,) = value.int64_list.value
        return number
    if type(feature) is tfds.features.Tensor:
        (content,) = value.bytes_list.value
        return np.frombuffer(content, feature.np_dtype).reshape([-1 if n is None else n for n in feature.shape])
    # tfds would let Pillow decode all that it can
    found = [np.asarray(decode(content)) for content in value.bytes_list.value]
    pixels = (found[0] if type(feature) is tfds.features.Image else np.stack(found))[..., : feature.shape[-1]]
    if pixels.shape != feature.shape:
        raise DataError(f"the stored pixels are {list(pixels.shape)}, wanted {list(feature.shape)}")
    return pixels


@dataclass(frozen=True)
class Moments:
    """Examples by index: `moments` float16 [*s 2c], `y`, and the other features that are read.

    `y` is a label, or the token ids of the first caption. If there are several, `captions` int32 [m n] are all of them.

    name: of the split, for errors. features: those that are read, by name.
    limit: number of classes, or of words in the vocabulary.
    shards: (file, number of its records in this split, number of its records before them).
    both: keep the versions for the image and its mirror image, on a leading axis, in all but `image` and `y`.
    """

    records: Any
    name: str
    limit: int
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
        if "label" in example:
            example["y"] = label_of(example.pop("label"), self.limit)
        else:
            tokens = checked(example.pop("tokens"), self.limit)
            example |= {"y": tokens[0]} | ({"captions": tokens} if len(tokens) > 1 else {})
        return example if self.both else chosen(example, False)


def label_of(label: int, num_classes: int) -> np.int32:
    """The label, if it is one of the classes; without classes it must be 0."""
    if not 0 <= label < max(num_classes, 1):
        raise DataError(f"label {label} is not in 0 .. {max(num_classes, 1) - 1}")
    return np.int32(label)


def checked(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """The token ids [m n] of m captions. DataError if there are none, or if one is not of the vocabulary."""
    if not tokens.size:
        raise DataError("it has no captions")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise DataError(f"token ids {tokens.min()} .. {tokens.max()} are not in 0 .. {vocabulary - 1}")
    return tokens


def told_classes(name: str, num_classes: int | None) -> int:
    """The number of classes of data that do not say it. ConfigError if the config does not either."""
    if num_classes is None:
        raise ConfigError(f"{name}: the data do not say how many classes they have: set num_classes (ImageNet: 1000)")
    return num_classes


def chosen(example: dict, mirror: bool) -> dict:
    """One version of an example that has both: of the image, or of its mirror image."""
    same = {name: example[name] for name in ("y", "captions") if name in example}
    parts = {name: value[int(mirror)] for name, value in example.items() if name not in (*same, "image")}
    if "image" in example:
        parts["image"] = example["image"][..., ::-1, :] if mirror else example["image"]
    return parts | same


def flip(example: dict, rng: np.random.Generator) -> dict:
    """Draw one version of an example that has both, with equal probability."""
    return chosen(example, rng.random() < 0.5)


def draw(example: dict, rng: np.random.Generator) -> dict:
    """Draw one of the captions of an example, with equal probability."""
    rest = dict(example)
    captions = rest.pop("captions", None)
    return rest if captions is None else rest | {"y": captions[rng.integers(len(captions))]}


def flip_and_draw(example: dict, rng: np.random.Generator) -> dict:
    """Draw one version of an example that has both, and one of its captions."""
    return draw(flip(example, rng), rng)


def make(
    split: str,
    *,
    data_dir: str,
    shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    mirror: bool = False,
    image: bool = False,
    cached: tuple[str, ...] = (),
) -> Dataset:
    """The latents in `data_dir`: `moments` float16 [h w 2c] and `y` int32, a label or the token ids [n] of a caption.

    Those of a video are [f h w 2c].

    Each draw takes one of the captions of an image. Captions name left and right, so do not set `mirror` with them.

    data_dir: what tools.prepare_latents has written.
    shape: of the latents, h w c or f h w c; by default as stored.
    num_classes: by default the number of stored class names; needed if the data have none. Not for captions.
    mirror: each draw takes the mirror image with probability 1/2, in every feature.
    image: also read `image`, uint8 [H W k] or [f H W k], which encoders run on.
    cached: also read stored encoder outputs, float16: `features/NAME` [n d] or `token/NAME` [d]. Patch tokens of a
        video are those of its frames, one after another, and it has no class token.

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
            if len(getattr(features.get("moments"), "shape", ())) not in (4, 5):
                raise DataError(f"latents: no feature 'moments' [2 h w 2c], given: {', '.join(sorted(features))}")
            _, *sides, channels = features["moments"].shape
            shape = *sides, channels // 2
        text = texts(folder, says, num_classes) if "tokens" in features else None
        if text is None:
            conditions, limit = labels(folder, says, features.get("label"), num_classes)
            condition = "label", (), np.integer
        else:
            conditions, limit = captioned(says["captions"]), text["vocabulary"]
            condition = "tokens", (..., text["length"]), np.int32
        check(features, tuple(shape), condition, image, cached)
        read = {name: features[name] for name in ("moments", condition[0], *["image"] * image, *cached)}
        files = tfds.core.data_sources.base.file_instructions(info, split)
        shards = tuple((one.filename, one.examples_in_shard if one.take == -1 else one.take, one.skip) for one in files)
        source = Moments(records, f"{data_dir}, split {split}", limit, read, shards, mirror)
        scale = says.get("vae", {}).get("scale")
        if scale is not None and not 0 < float(scale) < np.inf:
            raise ValueError(f"the scale of the autoencoder is {scale}")
        transform = (flip if mirror else None) if text is None else flip_and_draw if mirror else draw
        video = says.get("video", False)
        if type(video) is not bool or (video and len(shape) != 4):
            raise ValueError(f"{ABOUT} says video = {video!r:.40} of latents {list(shape)}")
        return Dataset(source, transform, Space(tuple(shape), conditions, video), scale, text)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # tfds has metadata of many kinds
        check_machine(error)
        raise DataError(f"latents: the metadata of {folder} cannot be used: {first_line(error)}") from error


def labels(folder: Path, says: Mapping[str, Any], feature: Any, num_classes: int | None) -> tuple[Conditions, int]:
    """The conditions of a set with labels, and the number of classes. feature: the stored label."""
    stored = getattr(feature, "num_classes", None)
    if num_classes is None:
        num_classes = len(says["classes"] or ()) if "classes" in says else stored
        num_classes = told_classes(f"latents: {folder}", num_classes)
    if stored is not None and stored > num_classes:
        raise DataError(f"latents: the data have {stored} classes, num_classes is {num_classes}")
    names = says.get("classes") or getattr(feature, "names", None) or ()
    return Conditions.labels(num_classes, names), num_classes


def texts(folder: Path, says: Mapping[str, Any], num_classes: int | None) -> dict[str, Any]:
    """What is known of the tokenizer of a set with captions, as in `Dataset.text`."""
    if num_classes is not None:
        raise ConfigError(f"latents: num_classes = {num_classes}, but {folder} has captions instead of classes")
    if not isinstance(says.get("captions"), dict):
        raise DataError(f"latents: {folder} has captions, but no {ABOUT} that says which tokenizer made them")
    text = {name: says["captions"][name] for name in ("sha256", "vocabulary", "length")}
    for name, most in (("vocabulary", INT32), ("length", MAX_LENGTH)):
        if type(text[name]) is not int or not 1 <= text[name] <= most:
            raise ValueError(f"captions have {name} = {text[name]!r:.80}")
    return text


def captioned(captions: Mapping[str, Any]) -> Conditions:
    """The conditions of a set with captions. The null condition is the empty text."""
    start, end, vocabulary = (captions[name] for name in ("start", "end", "vocabulary"))
    null = np.full(captions["length"], end, np.int32)
    null[0] = start
    return Conditions(checked(null[None], vocabulary)[0])
