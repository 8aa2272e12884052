"""Collections of encoded images with labels, read one by index: class folders, tar files, zips, tfds.

    folder   Every folder at the top is a class, in the order of the names; images may lie deeper. A dataset.json with
             `labels`, as in a zip, comes before the folders.
    tar      WebDataset: a .tar file, or a folder of them. KEY.jpg (.jpeg, .png, .webp) beside KEY.cls, a label in
             digits, or KEY.json with `label`.
    zip      Images, and dataset.json for their classes: {"labels": [[name, label], ...]}, as EDM2 and REPA pack them.
             Without it, class folders. All may lie in one folder of the zip.
    tfds     A data set in array_record files with features `image` and `label`, such as imagenet2012. Opening it reads
             every record once for names and labels: minutes for ImageNet.

A folder of splits holds folders named train, val, test or the like, and no others. Its `train` is then the collection.
Images are sorted by name. Bytes of a name that are not UTF-8 become backslashes. Without labels there are no classes.
"""

import contextlib
import errno
import io
import math
import os
import re
import tarfile
import threading
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diversedit_jax.data import label as whole_label
from diversedit_jax.data import local_path
from diversedit_jax.data.tfds_folder import first_line, open_folder, parsed, records_of
from diversedit_jax.errors import DataError, check_machine
from diversedit_jax.reading import RegularFile, member_start, parse_json, read_json, read_member, zip_members
from diversedit_jax.registry import one_of

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
READ = (*SUFFIXES, ".npy")  # kinds of files whose reading finds a damaged name
KINDS = ("folder", "tar", "zip", "tfds")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # that are decoded. For others, Pillow may start a program
PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
MAX_PIXELS = 2**27  # of an image: a larger one could exhaust the memory. Pillow's own limit is higher, 1.8e8
INDEX = "dataset.json"
SPLIT = re.compile(r"(train|training|val|valid|validation|dev|eval|test|testing)[-_]?\d*", re.IGNORECASE)
MAX_BESIDE = 1 << 20  # bytes of a file that holds the label or the caption of one image
ONE = {"images": "an image", "videos": "a video", "volumes": "a volume"}
Place = tuple[Path, int, int]  # a tar file, and offset and size of an image in it


@dataclass(frozen=True)
class ImageFiles:
    """A collection of images, of videos as `data.videos` opens them, or of volumes as `data.volumes` does.

    Many threads may read it, and it can be sent to other processes.

    path: where it lies, with the split if that is a folder. keys: unique names of the images.
    labels: int32 [n], all 0 without classes. classes: their names, or ().
    read: index -> the encoded image or volume, or the frames of a video.
    ignored: kind of other file -> how many there are. what: `images`, `videos` or `volumes`.
    """

    kind: str
    path: Path
    keys: Sequence[str]
    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], Any]
    ignored: Mapping[str, int]
    what: str = "images"

    def __len__(self) -> int:
        return len(self.keys)

    def __str__(self) -> str:
        classes = {0: "no classes", 1: "1 class"}.get(len(self.classes), f"{len(self.classes)} classes")
        return f"{len(self)} {self.what}, {classes}: {self.path}"


def open_images(
    path: str | Path,
    kind: str | None = None,
    split: str | None = None,
    unconditional: bool = False,
    texts: dict[str, tuple[str, bytes]] | None = None,
) -> ImageFiles:
    """Open the collection at `path`. DataError, in one line, if there is none.

    kind: one of KINDS; None: what lies at `path` decides. unconditional: do not read labels.
    split: of a tfds data set, or a subfolder of this name. None: `train`, where `path` has splits.
    texts: gets what .tar files hold beside each image instead of a label: key -> ("txt" or "json", content).
    """
    path = local_path("images", path)
    if kind is not None:
        one_of("images: kind", kind, KINDS)
    if not path.exists():
        raise DataError(f"images: {path} does not exist")
    kind = kind or _kind(path)
    if kind == "tfds":
        open_kind = partial(_tfds, split=split or "train")
    else:
        path = split_of(path, split)
        kind = _kind(path) if kind == "folder" else kind  # a split may hold tar files
        open_kind = {"folder": _folder, "tar": partial(_tars, texts=texts), "zip": _zip}[kind]
    return checked(open_kind(path, labelled=not unconditional))


def checked(images: ImageFiles) -> ImageFiles:
    """The collection with names that can be printed. DataError if it is empty, or has two images of one name."""
    what, path = images.what, images.path
    if not images.keys:
        others = "; ".join(f"{count} x {name}" for name, count in images.ignored.items()) or "nothing else"
        raise DataError(f"{what}: {path} holds no {what}, but {others}")
    keys = [_printable(key) for key in images.keys]
    if len(set(keys)) < len(keys):
        raise DataError(f"{what}: {path} has several {what} of the name {Counter(keys).most_common(1)[0][0]}")
    classes = tuple(map(_printable, images.classes))
    return replace(images, keys=keys, classes=classes, ignored={_printable(k): n for k, n in images.ignored.items()})


def _kind(path: Path) -> str:
    if not path.is_dir():
        if path.suffix not in (".tar", ".zip"):
            raise DataError(f"images: {path} is neither a folder nor a .tar or .zip file")
        return path.suffix[1:]
    if (path / "dataset_info.json").is_file():
        return "tfds"
    return "tar" if any(path.glob("*.tar")) else "folder"


def split_of(path: Path, split: str | None, what: str = "images") -> Path:
    """The folder of a split: `path` itself if it has no splits and none is asked for. what: as in `ImageFiles`."""
    below = []
    if path.is_dir():
        below = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name))
    if split in below:
        return path / split
    if split is not None:
        raise DataError(f"{what}: {path} has no split {split!r}; its folders: {', '.join(below) or 'none'}")
    if not below or not all(map(SPLIT.fullmatch, below)):
        return path
    if "train" not in below:
        raise DataError(f"{what}: {path} has folders that look like splits, and none named train: {', '.join(below)}")
    return path / "train"


def _is_hidden(name: str) -> bool:
    """Whether a member of an archive, or a folder above it, is hidden or added by macOS."""
    parts = name.split("/")
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def numbered(
    kind: str,
    path: Path,
    keys: list[str],
    labels: dict[str, int],
    read: Callable[[int], Any],
    ignored: Counter[str],
    what: str = "images",
) -> ImageFiles:
    """A collection whose classes are numbers. labels: by key, of all images; empty: there are no classes."""
    if labels and (without := [key for key in keys if key not in labels]):
        raise DataError(f"{what}: {without[0]} in {path} has no label, but others have one")
    if alone := len(labels.keys() - set(keys)):
        ignored[f"label without {ONE[what]}"] += alone
    numbers = np.array([labels.get(key, 0) for key in keys], np.int32)
    if numbers.min(initial=0) < 0:
        raise DataError(f"{what}: {keys[numbers.argmin()]} in {path} has the label {numbers.min()}, wanted 0 or more")
    classes = tuple(map(str, range(numbers.max() + 1))) if labels and len(keys) else ()
    return ImageFiles(kind, path, keys, numbers, classes, read, ignored, what)


def _folder(path: Path, labelled: bool) -> ImageFiles:
    ignored: Counter[str] = Counter()
    keys = sorted(walk(path, "", SUFFIXES, ignored))
    read = partial(read_file, path, keys)
    listed = _folder_index(path) if labelled else {}
    if listed is not None:
        ignored["*.json"] -= 1 if labelled else 0  # the index itself is used
        return numbered("folder", path, keys, listed, read, +ignored)
    if labelled and (deeper := sorted(path.glob(f"*/{INDEX}"))):
        raise DataError(f"images: {deeper[0]} lists labels: give {deeper[0].parent}, or set unconditional")
    return by_folder("folder", path, keys, read, ignored)


def by_folder(
    kind: str,
    path: Path,
    keys: list[str],
    read: Callable[[int], Any],
    ignored: Counter[str],
    top: str = "",
    what: str = "images",
) -> ImageFiles:
    """A collection whose classes are the folders in `top`."""
    tops = [key.removeprefix(top).rpartition("/")[0].partition("/")[0] for key in keys]
    classes = sorted({top for top in tops if top})
    if classes and "" in tops:
        both = f"in folders ({classes[0]}) and beside them ({keys[tops.index('')]})"
        raise DataError(f"{what}: {path} has {what} {both}: give each {what[:-1]} a folder, or set unconditional")
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number.get(top, 0) for top in tops], np.int32)
    return ImageFiles(kind, path, keys, labels, tuple(classes), read, ignored, what)


def index_labels(content: Mapping[str, Any]) -> dict[str, int]:
    """name -> label in a parsed dataset.json; {} if `labels` is null: there are no classes."""
    return {str(name): whole_label(label) for name, label in content["labels"] or ()}


def _folder_index(path: Path) -> dict[str, int] | None:
    """The labels of the dataset.json in a folder; None if there is no such file, or none with `labels`."""
    if not (path / INDEX).exists():
        return None
    try:
        content = read_json(path / INDEX)
        return index_labels(content) if isinstance(content, dict) and "labels" in content else None
    except (OSError, ValueError, TypeError) as error:
        check_machine(error)
        raise DataError(f"images: {path / INDEX} cannot be read: {type(error).__name__}: {error}") from error


def walk(
    top: Path, below: str, suffixes: tuple[str, ...], ignored: Counter[str], above: frozenset[Path] = frozenset()
) -> Iterator[str]:
    """Yield the names of all files with these suffixes below a folder. A link to a folder above is not followed."""
    here = (top / below).resolve()
    if here in above:
        ignored["link to a folder above"] += 1
        return
    with os.scandir(top / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                ignored["hidden file or folder"] += 1
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # the link may go in circles
                yield from walk(top, name, suffixes, ignored, above | {here})
            elif not entry.name.lower().endswith(suffixes):
                ignored[f"*{Path(entry.name).suffix or entry.name}"] += 1
            elif os.path.exists(entry.path) and not entry.is_file():
                ignored["pipe or device"] += 1  # reading it might never end
            else:
                yield name


def read_file(folder: Path, keys: Sequence[str], index: int) -> bytes:
    with opened(folder, keys[index]) as file:
        return file.read()


@contextlib.contextmanager
def opened(folder: Path, name: str) -> Iterator[RegularFile]:
    """A file of a collection, open. DataError if this file cannot be read, OSError if the disk is gone."""
    try:
        with RegularFile(folder / name) as file:
            yield file
    except OSError as error:
        check_machine(error)
        if not folder.is_dir() or error.errno in (errno.EIO, errno.ESTALE):  # the disk is gone, not this image alone
            raise
        raise DataError(f"cannot be read: {error.strerror}") from error


def _tars(path: Path, labelled: bool, texts: dict[str, tuple[str, bytes]] | None) -> ImageFiles:
    ignored: Counter[str] = Counter()
    places: dict[str, Place] = {}
    labels: dict[str, int] = {}

    def label(key: str, suffix: str, name: str, content: bytes) -> None:
        if (found := label_in(content, name)) is not None:
            labels[key] = found

    def text(key: str, suffix: str, name: str, content: bytes) -> None:
        if suffix == "txt" or _printable(key) not in texts:  # some tools write the caption into both
            texts[_printable(key)] = suffix, content

    beside = dict.fromkeys(("txt", "json"), text) if texts is not None else {"cls": label, "json": label}
    beside = beside if labelled or texts is not None else dict.fromkeys(beside)
    for file in tar_files(path, ignored):
        _scan_tar(file, beside, places, ignored)
    for key in labels.keys() - places.keys():
        ignored["label without an image"] += 1
        del labels[key]
    return numbered("tar", path, list(places), labels, partial(_read_range, list(places.values())), ignored)


def tar_files(path: Path, ignored: Counter[str]) -> Iterator[Path]:
    """The tar files in a folder, in the order of their names, or this one."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix == ".tar":
            yield file
        else:
            ignored["folder beside the .tar files" if file.is_dir() else f"*{file.suffix or file.name}"] += 1


def tar_members(file: Path, ignored: Counter[str]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The visible files in a tar file, in one pass over its headers."""
    end = 0
    with RegularFile(file) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset < end:  # tarfile would go round in circles
                raise tarfile.ReadError("it has a member of a negative size")
            end = member.offset_data
            if member.isdir():
                continue
            if not member.isfile() or member.issparse():
                ignored["link or device"] += 1
            elif _is_hidden(member.name):
                ignored["hidden file or folder"] += 1
            else:
                yield tar, member
        opened.seek(tar.offset)  # tarfile does not notice if a file was cut between two members
        if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is truncated: it has no end mark")


def _scan_tar(file: Path, beside: Mapping[str, Callable | None], places: dict[str, Place], ignored: Counter) -> None:
    """Add the images of one tar file, and what lies beside them, in one pass over its headers.

    beside: ending of such a file -> what takes its key, its ending, its name and its content; None: do not read it.
    """
    images: dict[str, dict[str, Place]] = {}  # key -> suffix -> place
    try:
        for tar, member in tar_members(file, ignored):
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{file.name}/{folder}/{stem}" if folder else f"{file.name}/{stem}"
            if f".{suffix}".lower().endswith(SUFFIXES):
                if suffix in images.setdefault(key, {}):
                    raise ValueError(f"it has two images of the name {member.name}")
                images[key][suffix] = (file, member.offset_data, member.size)
            elif suffix not in beside:
                ignored[f"*.{suffix}"] += 1
            elif (note := beside[suffix]) is not None:
                note(key, suffix, member.name, tar.extractfile(member).read(MAX_BESIDE))
        places |= {key: _plain(key, found, ignored) for key, found in images.items()}
    except (tarfile.TarError, OSError, ValueError) as error:
        check_machine(error)
        raise DataError(f"images: {file} cannot be read: {error}") from error


def _plain(key: str, images: Mapping[str, Place], ignored: Counter[str]) -> Place:
    """The image of a key among several: KEY.png beside KEY.mask.png. ValueError if there are two such images."""
    plain = [suffix for suffix in images if "." not in suffix] or list(images)
    if len(plain) > 1:
        raise ValueError(f"{key} has several images: .{', .'.join(plain)}")
    for suffix in images.keys() - set(plain):
        ignored[f"*.{suffix}"] += 1
    return images[plain[0]]


def label_in(content: bytes, name: str) -> int | None:
    """The label in KEY.cls or KEY.json of this name; None if a .json has none."""
    try:
        value = parse_json(content) if name.endswith("json") else content
        value = value.get("label") if isinstance(value, dict) else value
        return value if value is None else whole_label(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is not a label: {error}") from error


def _read_range(places: Sequence[Place], index: int) -> bytes:
    return read_place(places[index])


def read_place(place: Place) -> bytes:
    """A file in a tar file."""
    file, offset, size = place
    with RegularFile(file) as opened:
        opened.seek(offset)
        content = opened.read(size)
    if len(content) != size:
        raise DataError(f"{file} is truncated")
    return content


class ZipReader:
    """index -> the member names[index] of a zip, for many threads and processes. It verifies the member's checksum.

    Threads share the archive's directory, which takes 1.8 s and 113 MiB for 200,000 members. Every read opens the file.
    """

    def __init__(self, path: Path, names: Sequence[str]):
        self.path, self.names, self._lock = path, names, threading.Lock()
        self._directory: dict[str, zipfile.ZipInfo] = {}

    def __reduce__(self) -> tuple:
        return ZipReader, (self.path, self.names)

    def __call__(self, index: int) -> bytes:
        name = self.names[index]
        try:
            with RegularFile(self.path) as file:
                with self._lock:
                    if not self._directory:
                        self._directory.update(zip_members(file))
                if name not in self._directory:
                    raise ValueError("it is not there")
                return read_member(file, self._directory[name])
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error


def zip_index(path: Path) -> tuple[list[str], dict[str, int] | None]:
    """The names in a zip, sorted, and the labels of its dataset.json; None if it has none, {} if it has no labels.

    The names in the dataset.json are relative to its folder.
    """
    try:
        with RegularFile(path) as file:
            members = zip_members(file)
            names = sorted(name for name in members if not name.endswith("/"))
            for name in names:  # with a damaged bit, the name of an image or of the index would be that of another kind
                if not name.lower().endswith(READ):
                    member_start(file, members[name])
            indices = [name for name in names if name.rpartition("/")[2] == INDEX and not _is_hidden(name)]
            if len(indices) > 1:
                raise DataError(f"images: {path} holds several {INDEX}: {', '.join(indices[:3])}")
            if not indices:
                return names, None
            listed = index_labels(parse_json(read_member(file, members[indices[0]])))
            return names, {indices[0].removesuffix(INDEX) + name: label for name, label in listed.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        check_machine(error)
        raise DataError(f"images: {path} cannot be read: {type(error).__name__}: {error}") from error


def _zip(path: Path, labelled: bool) -> ImageFiles:
    names, listed = zip_index(path)
    visible = [name for name in names if not _is_hidden(name)]
    keys = [name for name in visible if name.lower().endswith(SUFFIXES)]
    others = (name for name in visible if not name.lower().endswith(SUFFIXES) and name.rpartition("/")[2] != INDEX)
    ignored = Counter(f"*{Path(name).suffix}" for name in others)
    ignored += Counter({"hidden file or folder": len(names) - len(visible)})
    if listed is None and labelled:
        return by_folder("zip", path, keys, ZipReader(path, keys), ignored, _wrapper(keys))
    return numbered("zip", path, keys, listed if labelled else {}, ZipReader(path, keys), ignored)


def _wrapper(keys: Sequence[str]) -> str:
    """The one folder of an archive that holds all class folders, with its slash; "" if there is none."""
    tops = {key.partition("/")[0] for key in keys}
    return f"{tops.pop()}/" if len(tops) == 1 and all(key.count("/") > 1 for key in keys) else ""


def _tfds(path: Path, labelled: bool, split: str) -> ImageFiles:
    try:
        builder = open_folder(path)
        records = records_of(builder, split)
    except Exception as error:
        check_machine(error)
        raise DataError(f"images: cannot open split {split!r} of {path}: {first_line(error)}") from error
    features = dict(builder.info.features.items())
    if "image" not in features or type(features["image"]).__name__ != "Image":
        raise DataError(f"images: {path} has no feature `image` of encoded images, given: {', '.join(features)}")
    label = features.get("label") if labelled else None
    name = "file_name" if "file_name" in features else None
    keys, labels = [], np.zeros(len(records), np.int32)
    try:
        for begin in range(0, len(records), 256):
            for index, record in enumerate(records.__getitems__(range(begin, min(begin + 256, len(records)))), begin):
                stored = parsed(record)
                keys.append(stored[name].bytes_list.value[0].decode() if name else f"{split}-{index:08d}")
                labels[index] = whole_label(stored["label"].int64_list.value[0]) if label is not None else 0
        classes = () if label is None else tuple(getattr(label, "names", map(str, range(labels.max(initial=-1) + 1))))
        if classes and labels.max(initial=-1) >= len(classes):
            raise ValueError(f"label {labels.max()} of {len(classes)} classes")
    except Exception as error:  # array_record and protobuf raise many kinds
        check_machine(error)
        raise DataError(f"images: split {split!r} of {path}, record {len(keys)}: {first_line(error)}") from error
    return ImageFiles("tfds", path, keys, labels, classes, partial(_read_record, records), {})


def _read_record(records: Any, index: int) -> bytes:
    return parsed(records[index])["image"].bytes_list.value[0]


def decode(content: bytes) -> Image.Image:
    """Decode an image to RGB as ADM does: drop transparency, do not apply EXIF orientation.

    16-bit images lose their lower byte. The content decides the format, not the name. DataError for a damaged image,
    and for one whose range of values is not known.
    """
    if not content:
        raise DataError("an empty file")
    try:
        if content.startswith(PNG):  # Pillow does not look at the checksum of the pixels while it decodes them
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.verify()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}")
            image.load()
            if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # of a PNG, I has 16 bits
                kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
                raise DataError(f"values are {kind} of unknown range: wanted 8 or 16 bits")
            if image.mode.startswith("I"):
                values = np.asarray(image)
                if 0 < values.max() < 256:
                    raise DataError(f"values have 16 bits, the largest is {values.max()} of 65535: stored as 8 bits?")
                image = Image.fromarray((values >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow raises nearly every kind on damaged files
        text = str(error).partition(" <")[0]
        raise DataError(f"not an image that can be decoded: {text or type(error).__name__}") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize an image and cut out its middle, uint8 [size size 3], as ADM does (guided-diffusion, arXiv 2105.05233).

    A box filter halves it while the shorter side is at least 2 * size; bicubic resizing does the rest. Of an image so
    long that the resized one would have more than MAX_PIXELS, only the middle is resized: equal but for rounding.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    sides = [round(side * scale) for side in image.size]
    corner = [(side - size) // 2 for side in sides]
    if math.prod(sides) > MAX_PIXELS:
        box = [
            (at + part) * side / resized
            for part in (0, size)
            for at, side, resized in zip(corner, image.size, sides, strict=True)
        ]
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    left, top = corner
    image = image.resize(tuple(sides), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def lanczos_crop(image: Image.Image, size: int) -> np.ndarray:
    """Cut out the middle square of an image and resize it by Lanczos, uint8 [size size 3], as U-ViT does for COCO."""
    side = min(image.size)
    left, top = ((whole - side) // 2 for whole in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.crop(box).resize((size, size), Image.Resampling.LANCZOS))


CROPS = {"adm": center_crop, "lanczos": lanczos_crop}


def crops_ahead(
    images: ImageFiles, indices: Iterable[int], size: int, pool: Executor, ahead: int, how: str = "adm"
) -> Iterator[tuple[int, Future]]:
    """Yield (index, future of its `crop`) in order, see `computed_ahead`."""
    return computed_ahead(partial(crop, images, size=size, how=how), indices, pool, ahead)


def computed_ahead(
    function: Callable[[int], Any], indices: Iterable[int], pool: Executor, ahead: int
) -> Iterator[tuple[int, Future]]:
    """Yield (index, future of `function`) in order. `pool` works on at most `ahead` of them at a time.

    Closing the generator cancels those that have not begun.
    """
    waiting: deque[tuple[int, Future]] = deque()
    rest = iter(indices)
    try:
        while True:
            for index in islice(rest, ahead - len(waiting)):
                waiting.append((index, pool.submit(function, index)))
            if not waiting:
                return
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()


def crop(images: ImageFiles, index: int, size: int, how: str = "adm") -> np.ndarray:
    """Decode and crop one image of a collection, uint8 [size size 3]. how: one of CROPS. Errors as of `image_of`."""
    return image_of(images, index, lambda image: CROPS[how](image, size))


def image_of(images: ImageFiles, index: int, changed: Callable[[Image.Image], Any] = np.asarray) -> np.ndarray:
    """Decode one image of a collection, uint8 [h w 3]. changed: what to make of it, such as a crop.

    Raises DataError with its name if the image is bad. MachineError and OSError mean that the machine fails.
    """
    with named(images.keys[index]):
        return changed(decode(images.read(index)))


@contextlib.contextmanager
def named(key: str) -> Iterator[None]:
    """Name the image or video of this key in errors, except MachineError and OSError: the machine fails."""
    try:
        yield
    except OSError as error:
        check_machine(error)
        raise
    except Exception as error:
        check_machine(error)
        text = str(error) if isinstance(error, DataError) else f"cannot be read: {error}"
        raise DataError(f"{key}: {text}") from error
