"""Collections of encoded images with labels, as people keep them: class folders, tar files, zips, tfds; one by index.

    folder   Class folders, nested or not: a class for each folder at the top, in the order of their names. Images
             without such folders have no classes. If dataset.json lies there with `labels`, as for a zip, they count,
             not the folders.
    tar      WebDataset: a .tar file or a folder of them; KEY.jpg (.jpeg, .png, .webp) beside KEY.cls, the label in
             digits, or KEY.json with `label`; without any of these there are no classes.
    zip      Images and, for their classes, dataset.json: {"labels": [[name, label], ...]}, as EDM2 and REPA pack them.
    tfds     A dataset in array_record files with features `image` and `label`, such as imagenet2012. Labels and names
             stand in the records alone: opening it reads all of them once, minutes for ImageNet.

The order is that of the names, whatever the file system says. Files that are no images by their name are counted.
Names of bytes that are no UTF-8 are written with backslashes.
"""

import io
import json
import os
import struct
import tarfile
import threading
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from diversedit_jax.data import local_path
from diversedit_jax.errors import ConfigError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
KINDS = ("folder", "tar", "zip", "tfds")
MAX_PIXELS = 2**27  # of an image; more would be an attack on the memory. Below Pillow's own limit, 1.8e8
INDEX = "dataset.json"


@dataclass(frozen=True)
class ImageFiles:
    """A collection. It may be read from many threads, and sent to other processes.

    keys: names of the images, unique. labels: int32 [n], all 0 without classes. classes: their names, () without.
    read: index -> the encoded image. ignored: what lies beside the images, by kind, and how often.
    """

    kind: str
    keys: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], bytes]
    ignored: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.keys)


def open_images(
    path: str | Path, kind: str | None = None, split: str = "train", unconditional: bool = False
) -> ImageFiles:
    """The collection at `path`; its kind is told by what lies there.

    split: of tfds; elsewhere the subfolder of this name, where there is one. unconditional: labels are not read.
    Raises DataError, in one line, for what is no collection, and ConfigError for an unknown kind.
    """
    path = local_path("images", path)
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"images: kind = {kind!r} is unknown; one of: {', '.join(KINDS)}")
    if not path.exists():
        raise DataError(f"images: {path} does not exist")
    path = path / split if (path / split).is_dir() else path
    kind = kind or _kind(path)
    opened = {"folder": _folder, "tar": _tars, "zip": _zip, "tfds": partial(_tfds, split=split)}[kind]
    found = opened(path, labelled=not unconditional)
    if not found.keys:
        beside = "; ".join(f"{count} x {what}" for what, count in found.ignored.items())
        raise DataError(f"images: {path} holds no images" + (f", but {beside}" if beside else ""))
    keys = [_printable(key) for key in found.keys]
    if len(set(keys)) < len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise DataError(f"images: {path} has several images of the name {twice}")
    classes = tuple(map(_printable, found.classes))
    return replace(found, keys=keys, classes=classes, ignored={_printable(k): n for k, n in found.ignored.items()})


def _kind(path: Path) -> str:
    if path.is_file():
        for kind, suffix in (("tar", ".tar"), ("zip", ".zip")):
            if path.suffix == suffix:
                return kind
        raise DataError(f"images: {path} is neither a folder nor a .tar or .zip file")
    if (path / "dataset_info.json").is_file():
        return "tfds"
    return "tar" if any(path.glob("*.tar")) else "folder"


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(SUFFIXES)


def _is_hidden(name: str) -> bool:
    """Whether a file of an archive, or a folder above it, is hidden, or one that macOS adds."""
    parts = name.split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)


def _printable(name: str) -> str:
    """A name in UTF-8, bytes that are none with backslashes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _folder(path: Path, labelled: bool) -> ImageFiles:
    ignored: Counter[str] = Counter()
    keys = sorted(_walk(path, "", ignored, frozenset()))
    read = partial(_read_file, path, keys)
    if labelled and (listed := _folder_index(path)) is not None:
        ignored["*.json"] -= 1
        return _listed(ImageFiles("folder", keys, np.zeros(0), (), read, +ignored), listed, path)
    if not labelled:
        return ImageFiles("folder", keys, np.zeros(len(keys), np.int32), (), read, ignored)
    tops = [key.partition("/")[0] if "/" in key else "" for key in keys]
    classes = sorted({top for top in tops if top})
    if classes and "" in tops:
        raise DataError(
            f"images: {path} has images in folders ({classes[0]}) and beside them ({keys[tops.index('')]}): "
            "their classes are not clear; give each a folder, or ask for unconditional"
        )
    number = {name: label for label, name in enumerate(classes)} | {"": 0}
    labels = np.array([number[top] for top in tops], np.int32)
    return ImageFiles("folder", keys, labels, tuple(classes), read, ignored)


def _folder_index(path: Path) -> dict[str, int] | None:
    """The labels of the dataset.json in a folder, {} where it says that there are none; None without such a file."""
    try:
        content = json.loads((path / INDEX).read_bytes())
        if not isinstance(content, dict) or "labels" not in content:
            return None
        return _labels(content) or {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"images: {path / INDEX} cannot be read: {type(error).__name__}: {error}") from error


def _labels(content: dict) -> dict[str, int] | None:
    """name -> label, as dataset.json has them; None where it says that there are none."""
    listed = content["labels"]
    return None if listed is None else {str(name): int(label) for name, label in listed}


def _listed(images: ImageFiles, listed: Mapping[str, int], path: Path) -> ImageFiles:
    """A collection with the labels of its dataset.json, without classes where there are none."""
    without = [key for key in images.keys if key not in listed]
    if listed and without:
        raise DataError(f"images: {without[0]} in {path} has no label in {INDEX}, but others have")
    alone = len(listed.keys() - set(images.keys))
    labels = np.array([listed[key] if listed else 0 for key in images.keys], np.int32)
    if listed and len(labels) and labels.min() < 0:
        raise DataError(f"images: {images.keys[labels.argmin()]} in {path} has the label {labels.min()}")
    classes = tuple(map(str, range(labels.max() + 1))) if listed and len(labels) else ()
    ignored = dict(images.ignored) | ({"label without an image": alone} if alone else {})
    return replace(images, labels=labels, classes=classes, ignored=ignored)


def _walk(top: Path, below: str, ignored: Counter, above: frozenset) -> Iterator[str]:
    """Names of the images in a folder, with those of its folders; a link to a folder above is not followed."""
    here = (top / below).resolve()
    if here in above:
        ignored["link to a folder above"] += 1
        return
    with os.scandir(top / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                ignored["hidden file or folder"] += 1
            elif entry.is_dir():
                yield from _walk(top, name, ignored, above | {here})
            elif is_image(entry.name) and os.path.exists(entry.path) and not entry.is_file():
                ignored["pipe or device"] += 1  # reading it might never end
            elif is_image(entry.name):
                yield name
            else:
                ignored[f"*{Path(entry.name).suffix or entry.name}"] += 1


def _read_file(folder: Path, keys: Sequence[str], index: int) -> bytes:
    try:
        return (folder / keys[index]).read_bytes()
    except (FileNotFoundError, PermissionError) as error:
        if not folder.is_dir():  # it is not this image alone: the disk has gone
            raise
        raise DataError(f"cannot be read: {error.strerror}") from error


def _tars(path: Path, labelled: bool) -> ImageFiles:
    ignored: Counter[str] = Counter()
    samples: list[tuple[str, tuple[Path, int, int], int | None]] = []
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.suffix == ".tar":
            samples += _samples(file, ignored, labelled)
        else:
            ignored["folder beside the .tar files" if file.is_dir() else f"*{file.suffix or file.name}"] += 1
    keys = [key for key, _, _ in samples]
    labels = [label for _, _, label in samples]
    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        raise DataError(f"images: {keys[labels.index(None)]} in {path} has no label, but others have")
    if known and min(known) < 0:
        raise DataError(f"images: {keys[labels.index(min(known))]} in {path} has the label {min(known)}")
    classes = tuple(map(str, range(max(known) + 1))) if known else ()
    places = [place for _, place, _ in samples]
    labels = np.array(labels if known else [0] * len(labels), np.int32)
    return ImageFiles("tar", keys, labels, classes, partial(_read_range, places), ignored)


def _samples(file: Path, ignored: Counter, labelled: bool) -> list[tuple[str, tuple[Path, int, int], int | None]]:
    """(key, place of the image, label) of one tar file, from one pass over its headers."""
    images: dict[str, dict[str, tuple[Path, int, int]]] = {}  # key -> suffix -> place
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if member.isdir():
                    continue
                if not member.isfile():
                    ignored["link or device"] += 1
                elif _is_hidden(member.name):
                    ignored["hidden file or folder"] += 1
                elif is_image(f".{suffix}"):
                    if suffix in images.setdefault(key, {}):
                        raise ValueError(f"it has two images of the name {member.name}")
                    images[key][suffix] = (file, member.offset_data, member.size)
                elif suffix not in ("cls", "json"):
                    ignored[f"*.{suffix}"] += 1
                elif labelled and (label := _label(tar.extractfile(member).read(), member.name)) is not None:
                    labels[key] = label
            with open(file, "rb") as opened:  # tarfile takes a file that was cut for one that ends there
                opened.seek(tar.offset)
                if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it is truncated: there is no mark at its end")
        places = {key: _the_image(key, found, ignored) for key, found in images.items()}
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"images: {file} cannot be read: {error}") from error
    alone = labels.keys() - images.keys()
    if alone:
        ignored["label without an image"] += len(alone)
    return [(f"{file.name}/{key}", place, labels.get(key)) for key, place in places.items()]


def _the_image(key: str, found: Mapping[str, tuple[Path, int, int]], ignored: Counter) -> tuple[Path, int, int]:
    """Of the images of one key that of the plain suffix, KEY.png beside KEY.mask.png; ValueError if not clear."""
    plain = [suffix for suffix in found if "." not in suffix] or list(found)
    if len(plain) > 1:
        raise ValueError(f"{key} has several images: .{', .'.join(plain)}")
    for suffix in found.keys() - set(plain):
        ignored[f"*.{suffix}"] += 1
    return found[plain[0]]


def _label(content: bytes, name: str) -> int | None:
    try:
        value = json.loads(content) if name.endswith("json") else int(content)
        value = value.get("label") if isinstance(value, dict) else value
        return value if value is None else int(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is no label: {error}") from error


def _read_range(places: Sequence[tuple[Path, int, int]], index: int) -> bytes:
    file, offset, size = places[index]
    with open(file, "rb") as opened:
        opened.seek(offset)
        content = opened.read(size)
    if len(content) != size:
        raise DataError(f"{file} is truncated")
    return content


@dataclass(frozen=True)
class ZipReader:
    """The members of a zip, from many threads and processes.

    The archive's directory is read once a process, not once a thread: 200,000 members take 1.8 s and 113 MiB. Members
    are then read where it says that they lie, by a handle of each read's own.
    """

    path: Path
    _directory: dict[str, zipfile.ZipInfo] = field(default_factory=dict, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __call__(self, name: str) -> bytes:
        with self._lock:
            if not self._directory:
                with zipfile.ZipFile(self.path) as file:
                    self._directory.update(file.NameToInfo)
        return _member(self.path, self._directory[name])


def _member(path: Path, info: zipfile.ZipInfo) -> bytes:
    """The content of a member, whose checksum is verified."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise DataError(f"{info.filename}: no header where the zip's directory says")
        file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)  # the name again, and extra fields
        content = file.read(info.compress_size)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        content = _inflated(info, content)
    elif info.compress_type != zipfile.ZIP_STORED:
        raise DataError(f"{info.filename}: compressed by method {info.compress_type}: wanted none, or deflate")
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise DataError(f"{info.filename}: damaged in the zip: {len(content)} of {info.file_size} bytes or a wrong CRC")
    return content


def _inflated(info: zipfile.ZipInfo, content: bytes) -> bytes:
    try:
        return zlib.decompress(content, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise DataError(f"{info.filename}: damaged in the zip: {error}") from error


def zip_index(path: Path) -> tuple[list[str], dict[str, int] | None]:
    """The names in a zip, sorted, and the labels of its dataset.json, None where it has none."""
    try:
        with zipfile.ZipFile(path) as file:
            names = sorted(info.filename for info in file.infolist() if not info.is_dir())
            return names, _labels(json.loads(file.read(INDEX))) if INDEX in names else None
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"images: {path} cannot be read: {type(error).__name__}: {error}") from error


def _zip(path: Path, labelled: bool) -> ImageFiles:
    names, listed = zip_index(path)
    hidden = [name for name in names if _is_hidden(name)]
    names = [name for name in names if not _is_hidden(name)]
    ignored = Counter(f"*{Path(name).suffix}" for name in names if not is_image(name) and name != INDEX)
    ignored += Counter({"hidden file or folder": len(hidden)})
    keys = [name for name in names if is_image(name)]
    found = ImageFiles("zip", keys, np.zeros(0), (), partial(_read_member, ZipReader(path), keys), ignored)
    return _listed(found, (listed or {}) if labelled else {}, path)


def _read_member(reader: ZipReader, keys: Sequence[str], index: int) -> bytes:
    return reader(keys[index])


def _tfds(path: Path, labelled: bool, split: str) -> ImageFiles:
    try:
        builder = tfds.builder_from_directory(str(path))
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    except Exception as error:
        raise DataError(f"images: cannot open split {split!r} of {path}: {error}".partition("\n")[0]) from error
    features = dict(builder.info.features.items())
    if "image" not in features or type(features["image"]).__name__ != "Image":
        raise DataError(f"images: {path} has no feature `image` of encoded images, given: {', '.join(features)}")
    label = features.get("label") if labelled else None
    name = "file_name" if "file_name" in features else None
    keys, labels = [], np.zeros(len(records), np.int32)
    for begin in range(0, len(records), 256):  # labels and names are in the records alone
        for index, record in enumerate(records.__getitems__(range(begin, min(begin + 256, len(records)))), begin):
            stored = tf_example_pb2.Example.FromString(record).features.feature
            keys.append(stored[name].bytes_list.value[0].decode() if name else f"{split}-{index:08d}")
            labels[index] = stored["label"].int64_list.value[0] if label is not None else 0
    classes = () if label is None else tuple(getattr(label, "names", map(str, range(labels.max() + 1))))
    return ImageFiles("tfds", keys, labels, classes, partial(_read_record, records), {})


def _read_record(records: Any, index: int) -> bytes:
    return tf_example_pb2.Example.FromString(records[index]).features.feature["image"].bytes_list.value[0]


def decode(content: bytes) -> Image.Image:
    """An encoded image in RGB, as ADM's code has it: transparency is dropped, EXIF orientation is not applied.

    CMYK, grey and palette images are converted, 16-bit ones lose their lower byte. The format is told by the content,
    not the name. Raises DataError for what cannot be decoded whole.
    """
    if not content:
        raise DataError("an empty file")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}")
            image.load()
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow raises nearly every kind on damaged files
        text = str(error).partition(" <")[0]
        raise DataError(f"not an image that can be decoded: {text or type(error).__name__}") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The middle of an image as uint8 [size size 3], resized as ADM does (guided-diffusion, arXiv 2105.05233).

    Halved with a box filter while the shorter side is at least twice as long as wanted, then bicubic, then cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def crops_ahead(
    images: ImageFiles, indices: Iterable[int], size: int, pool: Executor, ahead: int
) -> Iterator[tuple[int, Future]]:
    """(index, `crop` of it in the making), in order, of which `pool` works on at most `ahead` at a time.

    Closing it cancels what has not begun.
    """
    waiting: deque[tuple[int, Future]] = deque()
    rest = iter(indices)
    try:
        while True:
            while len(waiting) < ahead and (index := next(rest, None)) is not None:
                waiting.append((index, pool.submit(crop, images, index, size)))
            if not waiting:
                return
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()


def crop(images: ImageFiles, index: int, size: int) -> np.ndarray:
    """One image of a collection, decoded and cropped, uint8 [size size 3].

    DataError with its name where the image is to blame; OSError and MemoryError of the machine stay what they are.
    """
    try:
        return center_crop(decode(images.read(index)), size)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        text = str(error) if isinstance(error, DataError) else f"cannot be read: {error}"
        raise DataError(f"{images.keys[index]}: {text}") from error
