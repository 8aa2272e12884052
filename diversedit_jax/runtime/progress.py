"""The progress of a program, on a terminal and in a log."""

import contextlib
import io
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from tqdm import tqdm

QUIET = "quiet"  # the flag: only results and errors are printed


def say(text: str) -> None:
    """Print a line about what goes on, to stderr; nothing with --quiet."""
    if not quiet():
        print(text, file=sys.stderr, flush=True)


def quiet() -> bool:
    """Whether the program was started with --quiet."""
    return QUIET in flags.FLAGS and flags.FLAGS.is_parsed() and flags.FLAGS[QUIET].value


def done(seconds: float, places: Mapping[str, Any], what: str = "done") -> None:
    """Print the last lines of a program: how long it took, and where its results are. places: what -> path."""
    width = max(map(len, places), default=0) + 2
    lines = [f"  {name:<{width}}{place}" for name, place in places.items()]
    print("\n".join([f"{what} in {duration(seconds)}", *lines]), flush=True)


class Progress(contextlib.AbstractContextManager):
    """The progress of a run: one line per report, and on a terminal a live bar below.

    total, start: steps of the run, and those done before. Steps are counted from 1: call `update` after each.
    kind: what examples are, in a word.
    Rates leave out the first step (compilation) and the time in `pause()`.
    """

    def __init__(
        self,
        total: int,
        start: int,
        batch_size: int,
        kind: str,
        *,
        stream: io.TextIOBase | None = None,
        clock=time.monotonic,
    ):
        self._total, self._batch_size, self._kind = total, batch_size, kind
        self._stream, self._clock = stream or (io.StringIO() if quiet() else sys.stderr), clock
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._last: tuple[int, float] | None = None  # of the report before
        self._paused = 0.0
        self._bar = None
        if self._stream.isatty():
            form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=total, initial=start, file=self._stream, bar_format=form, dynamic_ncols=True)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int) -> None:
        """Say that `step` is done; call it after every step."""
        if self._first is None:
            self._first = self._last = (step, self._now())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Show the metrics. Returns `steps_per_sec` and `images_per_sec` since the last report; {} at first."""
        values = {name: float(value) for name, value in metrics.items()}  # waits: only steps that are done count
        self.update(step)
        now = self._now()
        rates, parts = {}, []
        if step > self._last[0] and now > self._last[1]:
            rate = (step - self._last[0]) / (now - self._last[1])
            rates = {"steps_per_sec": rate, "images_per_sec": rate * self._batch_size}
            left = (self._total - step) * (now - self._first[1]) / (step - self._first[0])
            examples = f"{brief(rate * self._batch_size)} {self._kind}/s"
            parts = [f"{brief(rate)} steps/s", examples, f"eta {duration(left)}"]
            self._last = (step, now)
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(parts))
        parts += [f"{name} {value + 0.0:.4g}" for name, value in values.items()]  # -0 becomes 0
        self.note("  ".join([f"step {step:>{len(str(self._total))}}/{self._total}", *parts]))
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
            print(text, file=self._stream, flush=True)

    def _now(self) -> float:
        return self._clock() - self._paused


class Ticker(contextlib.AbstractContextManager):
    """Progress through a number of things: a bar on a terminal, which stays if `leave`; elsewhere lines.

    kind: what they are, in a word.
    """

    def __init__(self, total: int, kind: str, done: int = 0, leave: bool = True):
        tty = sys.stderr.isatty() and not quiet()
        self.bar = tqdm(total=total, initial=done, unit=f" {kind}", smoothing=0.05, disable=not tty, leave=leave)
        self.total, self.kind, self.done, self.first = total, kind, done, done
        self.start = self.said = time.monotonic()

    def update(self, count: int) -> None:
        """So many more are done."""
        self.bar.update(count)
        self.done += count
        now = time.monotonic()
        if self.bar.disable and now - self.said >= 30:
            self.said = now
            rate = (self.done - self.first) / (now - self.start)
            left = duration((self.total - self.done) / rate)
            say(f"{self.done} of {self.total} {self.kind}, {rate:.1f} {self.kind}/s, {left} left")

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def brief(rate: int | float) -> str:
    """Three significant digits, or a whole number with commas: 0.0123, 13.4, 1,715."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: int | float) -> str:
    """45s, 1m37s, 2h05m, 3d04h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
