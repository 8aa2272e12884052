"""Metrics of a run, as JSON lines and as TensorBoard events."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from diversedit_jax.runtime.cli import silence
from diversedit_jax.runtime.files import write_text
from diversedit_jax.runtime.pictures import Pixels, image_grid, to_uint8

FLUSHED = 120.0  # seconds between two writes of TensorBoard's file: in a mounted bucket each sends all of it


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
    write_text(path, "".join(f"{line}\n" for line in lines if stays(line)))
