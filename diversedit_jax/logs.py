"""What a run tells about itself: metrics in files, a line of progress, versions, parameter tables, image grids."""

import contextlib
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview as clu_overview
from jaxtyping import Num, UInt8
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

import diversedit_jax

Pixels = np.ndarray | jax.Array
FLUSHED = 120.0  # seconds between two writes of TensorBoard's file: in a mounted bucket each sends all of it
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "libtpu")


class MetricWriter:
    """Metrics to `metrics.jsonl` and TensorBoard event files in one directory, under clu's MetricWriter method names.

    Give a resumed run its step as `start_step`: what a killed run wrote after that step is dropped from the JSON lines
    and hidden in TensorBoard. A step passed to a method must therefore be larger. Open one in one process only.
    """

    def __init__(self, directory: str | os.PathLike, start_step: int = 0):
        silence()
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        keep_until(directory / "metrics.jsonl", start_step)
        self._lines = open(directory / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        suffix = f".{start_step:09}"  # without it a restart within one second would overwrite the file before
        # Not tensorboardX.SummaryWriter: it writes in a thread that a full disk ends, and then waits for it for ever.
        self._events, self._flushed = EventsWriter(str(directory / "events"), suffix), -math.inf
        self._event(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # the first error says more
            self.close()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Numbers or arrays of one element; a non-finite value is the string "nan", "inf" or "-inf" in JSON."""
        values = {name: float(value) for name, value in scalars.items()}
        safe = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": int(step), "time": round(time.time(), 3), **safe}) + "\n")
        for name, value in values.items():
            self._event(step, summary=summary.scalar(name, value))

    def write_images(self, step: int, images: Mapping[str, Num[Pixels, "*n h w c"]]) -> None:
        """Images [h w c], or [n h w c] as a grid: uint8, or floats in [0, 1]."""
        for name, image in images.items():
            image = to_uint8(image)
            image = image_grid(image) if image.ndim == 4 else image
            image = np.broadcast_to(image, (*image.shape[:2], 3))
            self._event(step, summary=summary.image(name, image, dataformats="HWC"))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._event(step, summary=summary.text(name, text))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        for name, array in arrays.items():
            buckets = (num_buckets or {}).get(name, 30)
            self._event(step, summary=summary.histogram(name, np.asarray(array, np.float64).ravel(), buckets))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """The settings of the run; anything but a number, a bool or a string is written as text."""
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
        for part in summary.hparams(plain, {}):
            self._event(0, summary=part)

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=int(step), **content))
        if time.monotonic() - self._flushed >= FLUSHED:
            self.flush()

    def flush(self) -> None:
        self._lines.flush()
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        try:
            self._lines.close()
        finally:
            self._events.close()


def keep_until(path: Path, step: int) -> None:
    """Drop from a file of JSON lines those after `step` and those that are torn, atomically."""
    if not path.exists():
        return

    def stays(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines if stays(line)), encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place once it is written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Progress:
    """The progress of a run: a live bar on a terminal, elsewhere one line per report.

    progress = Progress(total=1500, start=0, batch_size=128)
    for step in ...:
        ...
        progress.update(step)
        if step % log_every == 0:
            rates = progress.report(step, metrics)  # {"steps_per_sec": .., "images_per_sec": ..}, {} at first

    Steps are counted from 1: `start` is the number of steps done before. Rates count from the end of the first step,
    so without compilation, and without the time in `pause()`. `report` waits for the metrics, so it measures steps
    that are done and not merely dispatched.
    """

    def __init__(
        self,
        total: int,
        start: int,
        batch_size: int,
        *,
        stream: io.TextIOBase | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._batch_size = total, batch_size
        self._stream, self._clock = stream or sys.stderr, clock
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._last: tuple[int, float] | None = None  # of the report before
        self._paused = 0.0
        self._bar = None
        if self._stream.isatty():
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=total, initial=start, file=self._stream, bar_format=form, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def update(self, step: int) -> None:
        """Say that `step` is done; call it after every step."""
        if self._first is None:
            self._first = self._last = (step, self._now())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Show the metrics; returns the rates since the report before, {} where no step has been timed."""
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        self.update(step)
        now = self._now()
        rates, parts = {}, []
        if step > self._last[0] and now > self._last[1]:
            rate = (step - self._last[0]) / (now - self._last[1])
            rates = {"steps_per_sec": rate, "images_per_sec": rate * self._batch_size}
            left = (self._total - step) * (now - self._first[1]) / (step - self._first[0])
            parts = [f"{brief(rate)} steps/s", f"{brief(rate * self._batch_size)} images/s", f"eta {duration(left)}"]
            self._last = (step, now)
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts))
        else:
            width = len(str(self._total))
            self._print("  ".join([f"step {step:>{width}}/{self._total}", *parts]))
        return rates

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time spent inside: evaluation, sampling, saving."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - begin

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            tqdm.write(text, file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _now(self) -> float:
        return self._clock() - self._paused

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Ticker:
    """Progress through a number of images: on a terminal a bar, which stays if asked to `leave`; else lines."""

    def __init__(self, total: int, done: int = 0, every: float = 30.0, leave: bool = True):
        tty = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit=" images", smoothing=0.05, disable=not tty, leave=leave)
        self.total, self.done, self.every = total, done, every
        self.start = self.said = time.monotonic()
        self.first = done

    def update(self, count: int) -> None:
        self.bar.update(count)
        self.done += count
        now = time.monotonic()
        if self.bar.disable and now - self.said >= self.every:
            self.said = now
            rate = (self.done - self.first) / (now - self.start)
            left = duration((self.total - self.done) / rate)
            print(f"{self.done} of {self.total} images, {rate:.1f} images/s, {left} left", file=sys.stderr, flush=True)

    def __enter__(self) -> "Ticker":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def brief(rate: int | float) -> str:
    """Three significant digits, or a whole number with commas: 0.0123, 13.4, 1,715."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: int | float) -> str:
    """45s, 1m37s, 2h05m, 3d04h."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def versions() -> dict[str, str]:
    """What the numbers of a run depend on: Python, libraries, this package and its git commit, and the devices."""
    found = {"python": platform.python_version(), "diversedit_jax": diversedit_jax.__version__}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    if commit := git_commit():
        found["git_commit"] = commit
    devices = jax.devices()
    return found | {"backend": jax.default_backend(), "devices": f"{len(devices)} x {devices[0].device_kind}"}


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty` if changed; None outside of one."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside someone else's checkout is not ours
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def parameter_overview(params: Mapping[str, Any]) -> str:
    """A table of the names, shapes, dtypes and sizes of nested dicts of arrays or ShapeDtypeStructs, and the total."""
    return clu_overview.get_parameter_overview(params, include_stats=False)


def image_grid(
    images: Num[Pixels, "n h w c"], columns: int | None = None, scale: int | None = None
) -> UInt8[np.ndarray, "H W c"]:
    """Images, uint8 with one channel or three, side by side on white, 2 pixels apart.

    `columns` defaults to a square grid. `scale` enlarges each pixel to a square (nearest neighbour); by default the
    least that makes an image 32 pixels high and wide, so that 8 x 8 digits can be read.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [n h w 1] or [n h w 3], got {images.dtype} {list(images.shape)}")
    scale = scale or math.ceil(32 / min(images.shape[1:3]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows, gap = math.ceil(n / columns), 2
    grid = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        grid[top : top + h, left : left + w] = image
    return grid


def to_uint8(image: Num[Pixels, "..."]) -> UInt8[np.ndarray, "..."]:
    """Floats in [0, 1] as bytes; bytes as they are."""
    image = np.asarray(image)
    return image if image.dtype == np.uint8 else (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def save_png(path: str | os.PathLike, image: UInt8[Pixels, "h w c"]) -> None:
    """Write an image with one channel or three; a reader never sees half a file."""
    image = np.asarray(image)
    with replacing(Path(path)) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, format="png")


def silence() -> None:
    """Keep the routine messages of our libraries off the terminal; what matters in them reaches ours as errors."""
    absl = logging.getLogger("absl")  # orbax and grain log through it
    if _not_routine not in absl.filters:
        absl.addFilter(_not_routine)
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns at each NaN


def _not_routine(record: logging.LogRecord) -> bool:
    """Orbax logs, with a traceback, errors that it also raises: all of it is dropped. Grain keeps its warnings."""
    source = record.pathname.replace(os.sep, "/")
    return not ("/orbax/" in source or ("/grain/" in source and record.levelno < logging.WARNING))
