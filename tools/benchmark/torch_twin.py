"""Our training step and our sampler in PyTorch, in a process of its own, to be timed beside ours.

    with Twin(job_of(experiment, params, batch, "train")) as twin:
        seconds = twin.run(10)

The process runs `torch_sit`. This module never imports torch: the CUDA libraries of torch and jax conflict in one
process. To share a GPU, jax must not preallocate its memory.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from math import inf
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diversedit_jax.api import Params
from diversedit_jax.diffusion import solvers
from diversedit_jax.diffusion.paths import PATHS
from diversedit_jax.errors import ConfigError, RunError
from diversedit_jax.losses import diversity
from diversedit_jax.models import patches
from diversedit_jax.registry import one_of
from diversedit_jax.runs.build import Experiment
from diversedit_jax.weights import dit as releases
from tools.convert_checkpoint import architecture

PROGRAM = Path(__file__).with_name("torch_sit.py")

# The values that the twin knows, by key of the config. Other keys (seed, remat, mesh, ...) do not change the result, or
# `job_of` reads them.
KNOWN = {
    "accumulate": (1,),
    "encoders": ({},),
    "codec.name": ("vae", "pixels"),
    "codec.vae": (None,),
    "model.name": ("dit",),
    "model.skip": ("none", "release"),
    "model.skip_init": (None, "xavier", "torch", "trunc_normal"),
    "model.dtype": ("float32", "bfloat16"),
    "model.stream_dtype": ("float32", "bfloat16"),
    "model.capture": ("merged",),
    "objective.name": ("flow_matching",),
    "objective.path": ("linear",),
    "objective.prediction": ("velocity",),
    "objective.weight": ("none",),
    "objective.time": ("uniform",),
}
KNOWN_TRAINING = {"optim.decay": ("constant",), "optim.warmup_steps": (0,)}
KNOWN_SAMPLING = {
    "sampler.solver": ("euler_maruyama",),
    "sampler.diffusion": ("sigma",),
    "sampler.diffusion_norm": (1.0,),
    "sampler.last_step_kind": ("mean",),
    "sampler.guidance_channels": (None,),
    "sampler.token_cfg_scale": (None,),
}
# Options of the diversity loss that must be those of its preset `release`.
RELEASED = ("redraw", "orthogonality", "mutual_information", "weight", "denominator", "detach_weight")
RELEASED += ("dispersion_absolute", "dispersion_clamp", "dispersion_blocks")


class Twin(contextlib.AbstractContextManager):
    """The process with a compiled job of `job_of`; the end of a `with` kills it.

    facts: `torch` (its version), `device`, `threads`, `compile` (whether the step is compiled), `why_not`, `compile_s`
    (seconds of the first step or evaluations, without a cache) and `parameters`.

    ConfigError without PyTorch. RunError, with the traceback, if the process fails here or in a call.
    """

    def __init__(self, job: Mapping[str, Any]):
        if importlib.util.find_spec("torch") is None:
            raise ConfigError("--vs=torch needs PyTorch: pip install torch")
        self._folder = tempfile.TemporaryDirectory(prefix="torch-twin-")
        self._log = Path(self._folder.name, "log")
        self._connection, theirs = Pipe()
        # PASSIVE: spinning threads of OpenMP make a step many times slower beside other work.
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"TORCHINDUCTOR_CACHE_DIR": self._folder.name},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        theirs.close()
        try:
            self.facts: dict[str, Any] = self._ask("begin", dict(job))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # the group may outlive this process
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._folder.cleanup()

    def run(self, count: int) -> float:
        """Wall seconds of `count` training steps or batches of samples."""
        return self._ask("run", count)

    def peak_bytes(self) -> int | None:
        """The peak of allocated GPU memory since the first step; None on a CPU."""
        return self._ask("peak_bytes")

    def once(self, inputs: Mapping[str, np.ndarray], steps: int = 1) -> dict[str, np.ndarray]:
        """The program's result for given draws, to compare with ours.

        train: from `x`, `noise` [b h w c], `t` and `y` (no label is dropped) to our metrics, `params/NAME` and
        `ema/NAME` after `steps` steps from the job's parameters.
        sample: from `x` [b h w c] at t = 1, `noise` [steps b h w c] and `y` to `x` at t = 0.
        """
        return self._ask("once", dict(inputs), steps)

    def _ask(self, *call: Any) -> Any:
        try:
            self._connection.send(call)
            while not self._connection.poll(1):
                if self._process.poll() is not None and not self._connection.poll():
                    raise EOFError
            value, error = self._connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its pipe and may need a moment to end
                self._process.wait(10)
            code, said = self._process.returncode, self._log.read_text(errors="replace")[-3000:]
            raise RunError(f"the process with PyTorch has ended with code {code}. It wrote: {said}") from None
        if error is not None:
            message, traceback = error
            raise RunError(f"PyTorch: {message}\n\n{traceback}")
        return value


def job_of(
    experiment: Experiment,
    params: Params,
    batch: Mapping[str, np.ndarray],
    kind: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    compile: bool = True,
) -> dict[str, Any]:
    """A config as plain data for `Twin`. ConfigError names what the twin cannot do.

    params: of our model. device: `cpu` or `cuda`. threads: of PyTorch on the CPU; None: its default.
    batch: for kind `train`: `moments` [b h w 2c] or `x` [b h w c], and `y`; for `sample`: the labels `y`.
    """
    config, shape = experiment.config, experiment.space.shape
    one_of("kind", kind, ("train", "sample"))
    _check(config, "", KNOWN | (KNOWN_TRAINING if kind == "train" else KNOWN_SAMPLING))
    if config.model.out_channels not in (None, shape[-1]):
        raise _not_among("model.out_channels", config.model.out_channels)
    arch = architecture(config.model, experiment.space)
    grid = (shape[0] // arch.patch, shape[1] // arch.patch)
    return (_training(config, arch.depth) if kind == "train" else _sampling(config)) | {
        "kind": kind,
        "device": device,
        "threads": threads,
        "compile": compile,
        "dtype": config.model.dtype,
        "network": arch._asdict() | {"grid": grid, "stream_dtype": config.model.stream_dtype},
        "positions": patches.position_table(grid, arch.width),
        "params": releases.export(jax.device_get(params), "sit", arch),
        "batch": {name: np.asarray(batch[name]) for name in ("moments", "x", "y") if name in batch},
    }


def _training(config: ConfigDict, depth: int) -> dict[str, Any]:
    """The part of a job for training."""
    optim = config.optim
    adamw = {"lr": optim.learning_rate, "betas": (optim.b1, optim.b2)}
    return {
        "adamw": adamw | {"eps": optim.eps, "weight_decay": optim.weight_decay},
        "clip": inf if optim.clip is None else optim.clip,
        "ema_decay": config.ema_decay,
        "label_drop": config.objective.condition_drop,
        "scale": config.codec.get("scale", 1.0),
        "bias": config.codec.get("bias", 0.0),
        "diversity": _diversity(config.losses, depth),
    }


def _diversity(losses: ConfigDict, depth: int) -> dict[str, Any] | None:
    if not losses:
        return None
    for label, loss in losses.items():
        if loss.name != "diversity":
            raise _not_among(f"losses.{label}", loss.name)
    if len(losses) > 1:
        raise _not_among("losses", sorted(losses))
    options = {name: value for name, value in loss.to_dict().items() if value is not None}
    settings = diversity.PRESETS[loss.preset]
    settings = settings._replace(**{name: options[name] for name in settings._fields if name in options})
    for name in RELEASED:
        if (value := getattr(settings, name)) != getattr(diversity.PRESETS["release"], name):
            raise _not_among(f"losses.{label}.{name}", value)
    _check(loss, f"losses.{label}.", {"detach": (None,), "warmup_steps": (0,)})
    pairs = diversity.select_pairs(depth, settings.rule, k=settings.k, aligned=loss.aligned, seed=loss.seed)
    return {
        "pairs": pairs.tolist(),
        "weights": tuple(settings.weights),
        "scale": settings.dispersion_scale,
        "lo": settings.lo,
        "hi": settings.hi,
        "coefficient": settings.coefficient,
        "groups": loss.groups,
    }


def _sampling(config: ConfigDict) -> dict[str, Any]:
    """The part of a job for sampling. Times and interval are float32, in which our sampler compares them."""
    options = config.sampler
    times = solvers.sde_times(options.steps, PATHS["linear"], "velocity", "sigma", "mean", options.last_step)
    times, interval = (np.asarray(x, np.float32).tolist() for x in (times, options.guidance_interval))
    return {"sampler": {"times": times, "cfg_scale": float(options.cfg_scale), "interval": interval}}


def _check(config: ConfigDict, before: str, known: Mapping[str, tuple]) -> None:
    """ConfigError for the first key of a config without a known value. before: a prefix for the message."""
    for place, values in known.items():
        *slots, name = place.split(".")
        part = config[slots[0]] if slots else config
        value = part.get(name)
        value = value.to_dict() if isinstance(value, ConfigDict) else value
        if value not in values and name in part:
            raise _not_among(before + place, value)


def _not_among(place: str, value: Any) -> ConfigError:
    return ConfigError(
        "--vs=torch compares SiT with flow matching, long residual connections `release` and the diversity loss; "
        f"config.{place} = {value!r} is not among them"
    )
