"""Metrics of a run, as JSON lines and as TensorBoard events."""

import contextlib
import io
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from diversedit_jax.runtime.cli import silence
from diversedit_jax.runtime.files import write_text
from diversedit_jax.runtime.loggers import Loggers

FLUSH_EVERY = 120.0  # seconds between two writes of TensorBoard's file: in a mounted bucket each sends all of it


class MetricWriter(contextlib.AbstractContextManager):
    """Metrics to `metrics.jsonl` and TensorBoard event files, with clu's names of methods. For one process only.

    start_step: the step of a resumed run. What a killed run wrote after it is dropped from the JSON lines and hidden in
    TensorBoard. Later writes must be of larger steps, or of what the run did not write at this one.

    loggers: get the same numbers and images.

    known: the names that the run wrote at `start_step`.
    """

    def __init__(self, directory: str | os.PathLike, start_step: int = 0, loggers: Loggers | None = None):
        silence()
        directory, self._loggers = Path(directory), loggers
        directory.mkdir(parents=True, exist_ok=True)
        kept = keep_until(directory / "metrics.jsonl", start_step)
        self.known = {name for line in kept if line["step"] == start_step for name in line}
        self._lines = open(directory / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        suffix = f".{start_step:09}"  # without it a restart within one second would overwrite the file before
        # Not tensorboardX.SummaryWriter: a full disk ends its thread, and then it waits for the thread forever.
        self._events, self._flushed = EventsWriter(str(directory / "events"), suffix), -math.inf
        self._event(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():  # the first error says more
            try:
                self._lines.close()
            finally:
                self._events.close()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Numbers, or arrays of one element. A value that is not finite is "nan", "inf" or "-inf" in JSON."""
        values = {name: float(value) for name, value in scalars.items()}
        safe = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._lines.write(json.dumps({"step": int(step), "time": round(time.time(), 3), **safe}) + "\n")
        for name, value in values.items():
            self._event(step, summary=summary.scalar(name, value))
        if self._loggers is not None:
            self._loggers.write_scalars(step, values)

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w c"]]) -> None:
        """Images with one channel or three."""
        for name, image in images.items():
            image = np.broadcast_to(image, (*image.shape[:2], 3))
            self._event(step, summary=summary.image(name, image, dataformats="HWC"))
        if self._loggers is not None and images:
            self._loggers.write_images(step, images)

    def write_moving(self, step: int, moving: Mapping[str, bytes]) -> None:
        """Pictures that move, as GIF files, to TensorBoard alone."""
        for name, content in moving.items():
            with Image.open(io.BytesIO(content), formats=("GIF",)) as opened:
                width, height = opened.size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            self._event(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """The settings of the run. Everything except numbers, bools and strings is written as text."""
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
        for part in summary.hparams(plain, {}):
            self._event(0, summary=part)

    def _event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=int(step), **content))
        if time.monotonic() - self._flushed >= FLUSH_EVERY:
            self._events.flush()
            self._flushed = time.monotonic()


def keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop torn lines, and lines of later steps, from a file of JSON lines. Returns what stays."""
    if not path.exists():
        return []
    kept, stays = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = json.loads(line)
            if content["step"] <= step:
                kept.append(content)
                stays.append(f"{line}\n")
    write_text(path, "".join(stays))
    return kept
