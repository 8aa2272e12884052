"""The metrics, images and config of a run, sent to Weights & Biases and MLflow as well.

Project, server and keys come from the environment variables that these libraries read themselves: WANDB_PROJECT,
WANDB_NAME, WANDB_API_KEY, WANDB_MODE=offline; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME. The name of a run is that of
its workdir. A resumed run goes on in the same run there: FILE in the workdir holds the ids. Delete FILE in a copy of a
workdir, or both write to the same run.
"""

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from diversedit_jax.errors import EXIT_PREEMPTED, ConfigError
from diversedit_jax.reading import read_json
from diversedit_jax.registry import one_of
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import flat, write_json

FILE = "loggers.json"
PAUSE = 600.0  # seconds: a server that does not answer holds up the training once in this time
WAIT = 60.0  # seconds to wait for Weights & Biases at the start, and at the end for what it has not sent
# MLflow waits for its server at each write. Its own values would hold up the training for many minutes.
MLFLOW = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # how a run ends


class Logger(Protocol):
    """A run of a tracker. Made from config, workdir, and its id if the run is resumed; its methods may raise."""

    id: str
    place: str  # where its user finds it

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None: ...

    def close(self, end: str) -> None: ...


class WandB:
    """A run of Weights & Biases. Its files are in WANDB_DIR, or else the workdir; a process of its own sends them.

    It refuses a step below its last one, and a killed run has written more than its checkpoint knows. So our step is a
    metric of its own, the x-axis of all others, and the same points are written again.
    """

    def __init__(self, config: Mapping[str, Any], workdir: Path, known: str | None):
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(
            console="off",
            silent=True,
            root_dir=os.environ.get("WANDB_DIR", str(workdir)),
            init_timeout=WAIT,
            finish_timeout=WAIT,
        )
        hooks = sys.exit, sys.excepthook  # it takes them
        try:
            if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False, verify=False):
                raise ValueError("no key: set WANDB_API_KEY, call `wandb login`, or set WANDB_MODE=offline")
            self.id = known or os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12]
            name = None if known else os.environ.get("WANDB_NAME", workdir.name)  # its user may have renamed it since
            self._run = wandb.init(id=self.id, name=name, resume="allow", settings=settings)
        finally:
            sys.exit, sys.excepthook = hooks
        self._image = wandb.Image
        self._run.config.update(dict(config), allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.place = self._run.url or f"wandb sync {Path(self._run.dir).parent}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers, also those that are not finite."""
        self._run.log({"step": step, **values})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images."""
        self._run.log({"step": step, **{name: self._image(image) for name, image in images.items()}})

    def close(self, end: str) -> None:
        """End the run."""
        if end == STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code={FINISHED: 0, STOPPED: EXIT_PREEMPTED, FAILED: 1}[end])


class MLflow:
    """A run of MLflow. Its parameters cannot change: what a resumed run changes becomes a tag, `config.KEY`."""

    def __init__(self, config: Mapping[str, Any], workdir: Path, known: str | None):
        for name, value in MLFLOW.items():
            os.environ.setdefault(name, value)
        self._mlflow = mlflow = importlib.import_module("mlflow")
        run = mlflow.start_run(run_id=known, run_name=None if known else workdir.name)
        self.id, self.place = run.info.run_id, f"run {run.info.run_id} at {mlflow.get_tracking_uri()}"
        given, before = {allowed(key): str(value) for key, value in flat(config).items()}, run.data.params
        try:
            mlflow.log_params({key: value for key, value in given.items() if key not in before})
            mlflow.set_tags({f"config.{k}": value for k, value in given.items() if before.get(k, value) != value})
        except Exception:
            mlflow.end_run("FAILED")
            raise

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers, also those that are not finite."""
        self._mlflow.log_metrics({allowed(name): value for name, value in values.items()}, step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images."""
        for name, image in images.items():
            self._mlflow.log_image(image, key=allowed(name), step=step)

    def close(self, end: str) -> None:
        """End the run."""
        self._mlflow.end_run({FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}[end])


KINDS = {"wandb": WandB, "mlflow": MLflow}


class Loggers(contextlib.AbstractContextManager):
    """The loggers that a config names. One that fails is noted, once for each thing it fails at. Nothing is raised.

    text: config.loggers. config: all of it. note: prints a line.
    """

    def __init__(self, text: str, config: Mapping[str, Any], workdir: Path, note: Callable[[str], None]):
        self._note, self._open = note, {}
        self._failed: dict[tuple[str, str], float] = {}  # (logger, what it failed at) -> when
        ids = {}
        with contextlib.suppress(OSError, TypeError, ValueError):  # it is not there, or damaged
            ids = dict(read_json(workdir / FILE))
        for name in named(text):
            with self._tolerating(name, "start"):
                made: Logger = KINDS[name](config, workdir, ids.get(name))
                self._open[name] = made
                write_json(workdir / FILE, ids := ids | {name: made.id})
                note(f"{name}: {made.place}")

    def __exit__(self, kind, error, traceback) -> None:
        end = FINISHED if kind is None else STOPPED if issubclass(kind, cli.Stopped) else FAILED
        self._all("finish", lambda logger: logger.close(end))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers."""
        self._all("write scalars", lambda logger: logger.scalars(step, scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images with one channel or three."""
        self._all("write images", lambda logger: logger.images(step, images))

    def _all(self, what: str, action: Callable[[Logger], None]) -> None:
        for name, logger in self._open.items():
            if time.monotonic() - self._failed.get((name, what), -PAUSE) >= PAUSE:
                with self._tolerating(name, what):
                    action(logger)

    @contextlib.contextmanager
    def _tolerating(self, name: str, what: str) -> Iterator[None]:
        """Note an error, if it is the first of its kind, and go on."""
        try:
            yield
        except Exception as error:
            if (name, what) not in self._failed:
                self._note(f"{name} could not {what}, the training goes on: {cli.reason(error)[:300]}")
            self._failed[name, what] = time.monotonic()


def named(text: str) -> list[str]:
    """The names in config.loggers, such as `wandb,mlflow`. ConfigError for an unknown one."""
    names = dict.fromkeys(name.strip() for name in text.split(",")) if text else {}
    return [one_of("config.loggers", name, KINDS) for name in names]


def check_installed(text: str) -> None:
    """Raise ConfigError if a library that config.loggers names is not installed. Nothing is imported."""
    for name in named(text):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of this name is none: the library itself makes it for runs
            raise ConfigError(f"config.loggers = {text!r}: {name} is not installed: pip install -e .[{name}]")


def allowed(name: str) -> str:
    """A name with the characters that MLflow allows: a label of a config may have others."""
    return re.sub(r"[^\w./ -]", "_", name)
