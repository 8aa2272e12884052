"""Our training step and our sampler in PyTorch, in a process of its own, for a benchmark that times both in turn.

    with Twin(job_of(experiment, params, batch, "train")) as twin:
        seconds = twin.run(10)

The process runs `torch_sit`, which says how its step is written. This one never imports torch: its CUDA libraries and
jax's do not get along in one process. A process of jax that is to share its GPU must not preallocate its memory.
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
from diversedit_jax.models import dit
from diversedit_jax.runs.build import Experiment
from diversedit_jax.weights import dit as releases
from diversedit_jax.weights.dit_names import Architecture

PROGRAM = Path(__file__).with_name("torch_sit.py")

# What the twin can do, by the place in a config. What is not here (seed, remat, mesh, ...) is not part of the step's
# result, or is read by `job_of`.
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
# Of the diversity loss: numbers and pairs may differ from `release`, these may not.
RELEASED = (
    "redraw",
    "orthogonality",
    "mutual_information",
    "dispersion_absolute",
    "dispersion_clamp",
    "dispersion_blocks",
    "weight",
    "denominator",
    "detach_weight",
)


class Twin:
    """The process with a job of `job_of`, compiled; at the end of a `with` it is killed.

    facts: `torch` (its version), `device`, `threads`, `compile` (whether the step is compiled) and `why_not`,
    `compile_s` (seconds of the first step, or of the sampler's first evaluations, in which all is compiled, without a
    cache), `parameters`.

    ConfigError without PyTorch; RunError with the traceback for what fails in the process, here or in any call.
    """

    def __init__(self, job: Mapping[str, Any]):
        if importlib.util.find_spec("torch") is None:
            raise ConfigError("--vs=torch needs PyTorch: pip install torch")
        self._folder = tempfile.TemporaryDirectory(prefix="torch-twin-")
        self._connection, theirs = Pipe()
        # OpenMP's threads wait by spinning otherwise, and beside other work a step then takes many times as long.
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
            self._kill()
            raise

    def __enter__(self) -> "Twin":
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()

    def run(self, count: int) -> float:
        """Wall seconds of so many training steps, or of so many whole batches of samples, one after another."""
        return self._ask("run", count)

    def peak_bytes(self) -> int | None:
        """The most memory that was allocated on the GPU at a time since the first step; None on a CPU."""
        return self._ask("peak_bytes")

    def once(self, inputs: Mapping[str, np.ndarray], steps: int = 1) -> dict[str, np.ndarray]:
        """What the job's program makes of given draws, for comparing it with ours.

        train: `x`, `noise` [b h w c], `t` and `y`, no label dropped, to our metrics, `params/NAME` and `ema/NAME`
        after so many steps from the job's parameters. sample: `x` [b h w c] at t = 1, `noise` [steps b h w c] and `y`
        to `x` at t = 0.
        """
        return self._ask("once", dict(inputs), steps)

    @property
    def _log(self) -> Path:
        return Path(self._folder.name, "log")

    def _ask(self, *call: Any) -> Any:
        try:
            self._connection.send(call)
            while not self._connection.poll(1):
                if self._process.poll() is not None and not self._connection.poll():
                    raise EOFError
            value, error = self._connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its end, and may take a moment to end
                self._process.wait(10)
            code, said = self._process.returncode, self._log.read_text(errors="replace")[-3000:]
            raise RunError(f"the process with PyTorch has ended with code {code}. It wrote: {said}") from None
        if error is not None:
            message, traceback = error
            raise RunError(f"PyTorch: {message}\n\n{traceback}")
        return value

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # a group may outlive its head
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._folder.cleanup()


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
    """What a config does, as plain data for `Twin`; ConfigError names what it cannot do.

    params: of our model. batch: for kind `train` `moments` [b h w 2c] or `x` [b h w c], and `y`; for `sample` the
    labels `y`. device: `cpu` or `cuda`. threads: of PyTorch on the CPU, by default as many as it takes. compile: by
    torch.compile.
    """
    config, (shape, conditions) = experiment.config, experiment.space
    if kind not in ("train", "sample"):
        raise ConfigError(f"kind = {kind!r}: must be train or sample")
    _check(config, "", KNOWN | (KNOWN_TRAINING if kind == "train" else KNOWN_SAMPLING))
    latents = "moments" if "moments" in batch else "x"
    inputs = (latents, "y") if kind == "train" else ("y",)
    if missing := [name for name in inputs if name not in batch]:
        raise ConfigError(f"a batch for kind {kind} needs {' and '.join(inputs)}; {' and '.join(missing)} is missing")
    if config.model.out_channels not in (None, shape[-1]):
        raise _not_among("model.out_channels", config.model.out_channels)
    size = dit.SIZES[config.model.size]
    depth, width, heads = size._replace(
        **{name: config.model[name] for name in size._fields if config.model[name] is not None}
    )
    patch = config.model.patch
    arch = Architecture(
        depth,
        width,
        heads,
        patch,
        channels=shape[-1],
        out_channels=shape[-1],
        num_classes=conditions.classes,
        mlp_ratio=config.model.mlp_ratio,
        qk_norm=config.model.qk_norm,
        skip=config.model.skip == "release",
    )
    return (_training(config, depth) if kind == "train" else _sampling(config)) | {
        "kind": kind,
        "device": device,
        "threads": threads,
        "compile": compile,
        "dtype": config.model.dtype,
        "network": {
            "grid": (shape[0] // patch, shape[1] // patch),
            "channels": shape[-1],
            "classes": conditions.classes,
            "depth": depth,
            "width": width,
            "heads": heads,
            "hidden": int(width * arch.mlp_ratio),
            "patch": patch,
            "qk_norm": arch.qk_norm,
            "skip": arch.skip,
            "stream_dtype": config.model.stream_dtype,
        },
        "positions": dit.position_table((shape[0] // patch, shape[1] // patch), width),
        "params": releases.export(jax.device_get(params), "sit", arch),
        "batch": {name: np.asarray(batch[name]) for name in inputs},
    }


def _training(config: ConfigDict, depth: int) -> dict[str, Any]:
    """The part of a job that is about training alone."""
    optim = config.optim
    return {
        "adamw": {
            "lr": optim.learning_rate,
            "betas": (optim.b1, optim.b2),
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
        },
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
    """The part of a job that is about sampling alone; times and interval as our sampler compares them, in float32."""
    options = config.sampler
    times = solvers.sde_times(options.steps, PATHS["linear"], "velocity", "sigma", "mean", options.last_step)
    interval = np.asarray(options.guidance_interval, np.float32).tolist()
    times = times.astype(np.float32).tolist()
    return {"sampler": {"times": times, "cfg_scale": float(options.cfg_scale), "interval": interval}}


def _check(config: ConfigDict, before: str, known: Mapping[str, tuple]) -> None:
    """ConfigError for the first place in a config, its names starting with `before`, that has no known value."""
    for place, values in known.items():
        *slots, name = place.split(".")
        part = config[slots[0]] if slots else config
        value = part.get(name)  # None for what a slot of another name lacks; the name itself is checked before
        value = value.to_dict() if isinstance(value, ConfigDict) else value
        if value not in values and name in part:
            raise _not_among(before + place, value)


def _not_among(place: str, value: Any) -> ConfigError:
    return ConfigError(
        "--vs=torch compares SiT with flow matching, long residual connections `release` and the diversity loss; "
        f"config.{place} = {value!r} is not among them"
    )
