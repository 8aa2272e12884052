"""Profiles of windows of steps, for XProf: where the time of a step goes, on the device and on the host."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from diversedit_jax.errors import ConfigError


def windows(text: str) -> list[tuple[int, int]]:
    """`100:105,5000:5005` as first and last steps. ConfigError for another form, or another order."""
    found = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+):(\d+)", part)
        first, last = map(int, match.groups()) if match else (0, 0)
        if not 1 <= first <= last or (found and first <= found[-1][1]):
            raise ConfigError(f"config.profile = {text!r}: wanted FIRST:LAST of steps, or several in order")
        found.append((first, last))
    return found


class Profiler:
    """Profiles in `directory`/plugins/profile, where TensorBoard and XProf look.

    with profiler.step(i):  # around every step, counted from 1
        result = ...
    profiler.after(i, result)  # waits for the result if a window ends here
    """

    def __init__(self, text: str, directory: Path, note: Callable[[str], None]):
        self._windows, self._directory, self._note = windows(text), directory, note
        self._open = False

    @contextlib.contextmanager
    def step(self, step: int):
        """Mark a step, and start the window that begins with it."""
        if not self._open and any(first <= step <= last for first, last in self._windows):
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # no Python calls: they would hide the rest
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._open = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, result: Any) -> None:
        """End the window that ends with this step, when `result` of the step is ready."""
        if self._open and any(step == last for _, last in self._windows):
            jax.block_until_ready(result)
            self.close()
            self._note(f"profiled up to step {step}: xprof --logdir {self._directory}")

    def close(self) -> None:
        """End the open window, if any."""
        if self._open:
            jax.profiler.stop_trace()
            self._open = False
