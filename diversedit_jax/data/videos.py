"""Collections of videos with labels, read as clips: equal numbers of frames, cropped as images are.

    folder   Every folder at the top is a class, in the order of the names; videos may lie deeper. A video is a file, or
             a folder of frames: images, and neither videos nor folders, in the natural order of their names (2 before
             10).
    tar      WebDataset: a .tar file, or a folder of them. A video is KEY.mp4 (or another suffix), as video2dataset
             writes it, or its frames: KEY.000.jpg, KEY.001.jpg ..., or the images in a folder KEY/. Beside it KEY.cls,
             a label in digits, or KEY.json with `label`.

Files of videos end in one of MOVING, frames in one of FRAMES. A .gif or .webp is a video, never a frame. FFmpeg decodes
videos (PyAV, the extra `video`), but Pillow .gif and .webp. The content decides, not the name. A folder of splits is
one as for images: its `train` is the collection. Images beside videos are ignored.

A clip has every `interval`-th frame of its video, from the first one on. Frames are counted as they are stored: time
stamps do not matter, nor does a rotation that players apply. Nothing is resampled.

A video that FFmpeg finds damaged or cut off is an error, and none of its frames are used. Most codecs have no
checksums: damage that decodes is not seen.
"""

import contextlib
import io
import itertools
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diversedit_jax.data import local_path
from diversedit_jax.data.image_collections import (
    CROPS,
    MAX_BESIDE,
    ImageFiles,
    Place,
    by_folder,
    checked,
    decode,
    label_in,
    named,
    numbered,
    opened,
    read_place,
    split_of,
    tar_files,
    tar_members,
    walk,
)
from diversedit_jax.errors import ConfigError, DataError, check_machine
from diversedit_jax.registry import in_range, one_of

FRAMES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
PICTURES = (".gif", ".webp")  # that Pillow decodes
MOVING = (".mp4", ".mov", ".webm", ".mkv", ".avi", *PICTURES)
KINDS = ("folder", "tar")
WINDOWS = ("all", "first")
MAX_PIXELS = 2**25  # of a frame: 8K. A decoder keeps up to 16 of them
MAX_FRAMES = 2**18  # of a video: 2.4 hours at 30 a second
MAX_BYTES = 2**30  # of the clips of a video, and of a file that is read at once
# FFmpeg may open nothing but the file that it is given, whatever a playlist in it says.
CONTAINER = {"format_whitelist": "mov,matroska,webm,avi", "protocol_whitelist": "none"}
CODEC = {"max_pixels": str(MAX_PIXELS)}
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # the two elements of a Matroska file

Frame = Callable[[], Image.Image]  # decodes a frame to RGB, before the next one is asked for


class Sampling(NamedTuple):
    """How clips are taken from a video.

    frames: of a clip. interval: every `interval`-th frame is used. windows: `all` clips that do not overlap, from the
    first frame on, what is left at the end is not used; or the `first` clip alone.
    """

    frames: int
    interval: int = 1
    windows: str = "all"

    @property
    def shortest(self) -> int:
        """The number of frames of the shortest video that gives a clip."""
        return (self.frames - 1) * self.interval + 1

    def check(self) -> None:
        """Raise ConfigError for numbers that are no sampling."""
        in_range("--frames", self.frames, 1)
        in_range("--interval", self.interval, 1)
        one_of("--windows", self.windows, WINDOWS)


def open_videos(
    path: str | Path, kind: str | None = None, split: str | None = None, unconditional: bool = False
) -> ImageFiles:
    """Open the collection at `path`; `read` gives an iterator of `Frame`. DataError, in one line, if there is none.

    kind: one of KINDS; None: what lies at `path` decides. split: a subfolder of this name; None: `train`, where `path`
    has splits. unconditional: do not read labels. ConfigError if the videos need FFmpeg and it is not there.
    """
    path = local_path("videos", path)
    if kind is not None:
        one_of("videos: kind", kind, KINDS)
    if not path.exists():
        raise DataError(f"videos: {path} does not exist")
    path = split_of(path, split, "videos")
    if not path.is_dir() and path.suffix != ".tar":
        raise DataError(f"videos: {path} is neither a folder nor a .tar file")
    if kind is None:
        kind = "folder" if path.is_dir() and not any(path.glob("*.tar")) else "tar"
    return checked({"folder": _folder, "tar": _tars}[kind](path, labelled=not unconditional))


@dataclass(frozen=True)
class Reader:
    """index -> an iterator of the frames of a video.

    files: of each video: its file, or those of its frames in order. moving: whether it is a file. opened: opens one.
    """

    files: Sequence[Sequence[Any]]
    moving: Sequence[bool]
    opened: Callable[[Any], contextlib.AbstractContextManager[io.BufferedIOBase]]

    def __call__(self, index: int) -> Iterator[Frame]:
        if not self.moving[index]:
            yield from (partial(self._frame, file) for file in self.files[index])
            return
        with self.opened(self.files[index][0]) as file:
            start = file.read(12)
            if not start:
                raise DataError("an empty file")
            file.seek(0)
            yield from _pictures(_whole(file)) if _is_picture(start) else _ffmpeg(file)

    def _frame(self, file: Any) -> Image.Image:
        with self.opened(file) as content:
            return decode(_whole(content))


def _whole(file: io.BufferedIOBase) -> bytes:
    """The content of a file. DataError for a huge one."""
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"a file of more than {MAX_BYTES >> 30} GiB")
    return content


def _natural(name: str) -> tuple:
    """A key that sorts names with numbers by these numbers."""
    parts = re.split(r"(\d+)", name)  # text, digits, text ...
    numbers = [(len(part.lstrip("0")), part.lstrip("0")) for part in parts[1::2]]
    return list(itertools.chain.from_iterable(zip(parts[::2], [*numbers, ()], strict=True))), name


def _above(key: str) -> Iterator[str]:
    """The folders above a video."""
    while key := key.rpartition("/")[0]:
        yield key


class Found(NamedTuple):
    """The videos of a collection while it is scanned.

    files: key -> (name, file) of a video that is a file. frames: key -> name -> file, of one that is many.
    """

    files: dict[str, tuple[str, Any]]
    frames: defaultdict[str, dict[str, Any]]

    def keys(self, ignored: Counter[str]) -> list[str]:
        """The videos in the order of their names. Images beside videos are none, and are counted in `ignored`."""
        if any(not name.lower().endswith(PICTURES) for name, _ in self.files.values()):
            _av()  # raises at once if it is not there
        taken = {folder for key in (*self.files, *self.frames) for folder in _above(key)} | self.files.keys()
        for key in taken & self.frames.keys():
            ignored.update(f"*{Path(name).suffix} beside a video" for name in self.frames.pop(key))
        return sorted([*self.files, *self.frames])

    def reader(self, keys: Sequence[str], opened: Callable) -> "Reader":
        """What reads these videos."""
        moving = [key in self.files for key in keys]
        files = [[self.files[key][1]] if key in self.files else self._in_order(key) for key in keys]
        return Reader(files, moving, opened)

    def _in_order(self, key: str) -> list[Any]:
        return [self.frames[key][name] for name in sorted(self.frames[key], key=_natural)]


def _folder(path: Path, labelled: bool) -> ImageFiles:
    ignored: Counter[str] = Counter()
    found = Found({}, defaultdict(dict))
    for name in walk(path, "", (*FRAMES, *MOVING), ignored):
        folder = name.rpartition("/")[0]
        if name.lower().endswith(MOVING):
            found.files[name] = name, name
        elif folder:
            found.frames[folder][name] = name
        else:
            ignored[f"*{Path(name).suffix}"] += 1
    keys = found.keys(ignored)
    read = found.reader(keys, partial(opened, path))
    if labelled:
        return by_folder("folder", path, keys, read, ignored, what="videos")
    return numbered("folder", path, keys, {}, read, ignored, "videos")


def _tars(path: Path, labelled: bool) -> ImageFiles:
    ignored: Counter[str] = Counter()
    found, labels = Found({}, defaultdict(dict)), {}
    for file in tar_files(path, ignored):
        try:
            _scan(file, found, labels if labelled else None, ignored)
        except (tarfile.TarError, OSError, ValueError) as error:
            check_machine(error)
            raise DataError(f"videos: {file} cannot be read: {error}") from error
    keys = found.keys(ignored)
    for key in labels.keys() - set(keys):
        ignored["label without a video"] += 1
        del labels[key]
    return numbered("tar", path, keys, labels, found.reader(keys, _in_tar), ignored, "videos")


def _in_tar(place: Place) -> io.BufferedIOBase:
    if place[2] > MAX_BYTES:
        raise DataError(f"a file of more than {MAX_BYTES >> 30} GiB in a tar file")
    return io.BytesIO(read_place(place))


def _scan(file: Path, found: Found, labels: dict[str, int] | None, ignored: Counter[str]) -> None:
    """Add the videos of a tar file, and their labels; None: do not read them."""
    for tar, member in tar_members(file, ignored):
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        above = f"{file.name}/{folder}" if folder not in ("", ".") else file.name
        key, ending = f"{above}/{stem}", f".{suffix}".lower()
        place = file, member.offset_data, member.size
        if ending.endswith(MOVING):
            if key in found.files:
                raise ValueError(f"{key} has several videos: {found.files[key][0]}, {name}")
            found.files[key] = name, place
        elif ending.endswith(FRAMES) and ("." in suffix or above != file.name):
            frames = found.frames[key if "." in suffix else above]
            if name in frames:
                raise ValueError(f"it has two images of the name {member.name}")
            frames[name] = place
        elif suffix not in ("cls", "json"):
            ignored[f"*.{suffix}"] += 1
        elif labels is not None:
            label = label_in(tar.extractfile(member).read(MAX_BESIDE), member.name)
            labels |= {} if label is None else {key: label}


def _is_picture(start: bytes) -> bool:
    """Whether a file that starts so is a .gif or .webp, whatever its name."""
    return start.startswith(b"GIF8") or (start.startswith(b"RIFF") and start[8:12] == b"WEBP")


def _pictures(content: bytes) -> Iterator[Frame]:
    """The frames of a .gif or .webp. Each is the whole picture at its time, without transparency."""
    try:
        with Image.open(io.BytesIO(content), formats=("GIF", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS}")
            for number in range(image.n_frames):
                image.seek(number)
                rgb = image.convert("RGB")
                yield lambda rgb=rgb: rgb
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow raises nearly every kind on damaged files
        raise DataError(f"not a moving picture that can be decoded: {error or type(error).__name__}") from error


def _av() -> Any:
    try:
        import av  # here, because only videos need it
    except ImportError:
        raise ConfigError("videos: PyAV is not installed: pip install diversedit_jax[video]") from None
    return av


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Turn FFmpeg's errors into DataError. Some of them are OSErrors, but no disk is to blame."""
    av = _av()
    try:
        yield
    except av.FFmpegError as error:
        bytearray(1 << 26)  # FFmpeg lacks memory for an absurd size in a file; if it is the machine, so does this
        raise DataError(f"not a video that can be decoded: {error.strerror}") from error


def _ffmpeg(file: io.BufferedIOBase) -> Iterator[Frame]:
    """The frames of a video that FFmpeg decodes."""
    if file.seek(0, io.SEEK_END) < _announced(file):
        raise DataError("it is truncated")
    file.seek(0)
    old = int(_av().__version__.partition(".")[0]) < 19  # it refuses tags that are not UTF-8
    tags = {"metadata_errors": "replace"} if old else {}
    with _decoding(), _av().open(file, options=CONTAINER | CODEC, **tags) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise DataError("it holds no video that can be decoded")
        stream.codec_context.thread_count = 1  # many videos are decoded side by side
        stream.codec_context.options = CODEC
        for packet in container.demux(stream):
            frames = packet.decode()
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                raise DataError("it is damaged or truncated")
            yield from (partial(_rgb, frame) for frame in frames)


def _rgb(frame: Any) -> Image.Image:
    with _decoding():
        return frame.to_image()


def _announced(file: io.BufferedIOBase) -> int:
    """The size of a Matroska or WebM file, as it says; 0: it does not, or it is another file.

    FFmpeg takes the end of such a file for the end of the video.
    """
    file.seek(0)
    head, place = file.read(1 << 12), 0
    for name in (EBML, SEGMENT):
        start = place + len(name)
        if head[place:start] != name or start >= len(head):
            return 0
        length = 9 - head[start].bit_length()  # of the size, whose first bits say it
        size = int.from_bytes(head[start : start + length]) & ((1 << 7 * length) - 1)
        place = start + length + size
    return 0 if size == (1 << 7 * length) - 1 else place


def clips(videos: ImageFiles, index: int, sampling: Sampling, size: int, how: str = "adm") -> list[np.ndarray]:
    """The clips of one video, uint8 [f size size 3] each. how: the crop of frames, one of CROPS.

    Raises DataError with the name of the video if it is bad or too short. MachineError and OSError mean that the
    machine fails.
    """
    with named(videos.keys[index]), contextlib.closing(videos.read(index)) as frames:
        return _taken(frames, sampling, size, how)


def _taken(frames: Iterable[Frame], sampling: Sampling, size: int, how: str) -> list[np.ndarray]:
    found, clip, number = [], [], -1
    for number, frame in enumerate(frames):
        if number == MAX_FRAMES:
            raise DataError(f"more than {MAX_FRAMES} frames: cut it into shorter videos")
        if number % sampling.interval:
            continue
        try:
            clip.append(CROPS[how](frame(), size))
        except DataError as error:
            raise DataError(f"frame {number}: {error}") from error
        if len(clip) == sampling.frames:
            found.append(np.stack(clip))
            clip = []
            if sampling.windows == "first":
                break
            if sum(one.nbytes for one in found) > MAX_BYTES:
                raise DataError(f"its clips take more than {MAX_BYTES >> 30} GiB: cut it into shorter videos")
    if not found:
        raise DataError(f"{number + 1} frames, and the shortest clip takes {sampling.shortest}")
    return found
