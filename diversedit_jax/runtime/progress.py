"""The progress of a program, on a terminal and in a log."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tqdm import tqdm


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
