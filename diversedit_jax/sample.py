"""Sample from a trained run.

    python -m diversedit_jax.sample --workdir=DIR --num=64 --cfg_scale=1.8 --guidance_interval=0,0.7

Uses the EMA weights of the last checkpoint, and the run's own sampler where no flag says otherwise. Writes
DIR/samples_STEP/grid.png and samples.npz: `arr_0`, uint8 images [n h w c], and `labels`; the ADM evaluator reads it.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from diversedit_jax import config as configs
from diversedit_jax import experiment, logs, program, samplers, sampling, sharding
from diversedit_jax.checkpoint import Checkpoints
from diversedit_jax.errors import ConfigError

OVERRIDES = ("solver", "steps", "cfg_scale", "guidance_interval", "guidance_channels")
OVERRIDES += ("diffusion", "last_step_kind", "last_step", "rtol", "atol", "eta", "batch_size")


def run(
    workdir: str | Path,
    *,
    num: int = 64,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    step: int | None = None,
    out: str | Path | None = None,
    weak_step: int | None = None,
    **overrides,
) -> Path:
    """Write `num` samples of the run in `workdir`, of `labels` in turn (default: every class in turn); returns where.

    step: of the checkpoint, by default the last. overrides: of `config.sampler`, None to leave it as it is.
    weak_step: guide by the run's own weights at this earlier step, with cfg_scale (autoguidance, arXiv 2406.02507).
    """
    logs.silence()
    workdir = Path(workdir).expanduser().absolute()
    config = configs.load(workdir)
    if num < 1:
        raise ConfigError(f"num = {num}: must be positive")
    given = {name: value for name, value in overrides.items() if value is not None}
    config.sampler.update(given)
    checkpoints = Checkpoints(workdir / "checkpoints")
    meta = checkpoints.meta(step)
    step = checkpoints.latest() if step is None else step
    num_classes = meta["num_classes"]
    chosen = np.arange(num_classes) if labels is None else np.array(labels)
    if chosen.size == 0 or chosen.min() < 0 or chosen.max() >= num_classes:
        raise ConfigError(f"labels must be in 0 .. {num_classes - 1}, given {', '.join(map(str, chosen))}")

    mesh, parts, sample, _ = experiment.build(config, tuple(meta["shape"]), num_classes)
    abstract = jax.eval_shape(parts.model.init, jax.random.key(0))
    target = sharding.placed(abstract, sharding.shardings({"ema": abstract}, mesh)["ema"])
    params, _ = checkpoints.restore_part(target, "ema", step)
    weak = None if weak_step is None else checkpoints.restore_part(target, "ema", weak_step)[0]
    y = np.resize(chosen, num).astype(np.int32)
    begin = time.monotonic()
    images = sample(params, experiment.prepared(parts.prepare, mesh), y, seed, weak)
    seconds = time.monotonic() - begin

    folder = Path(out).expanduser().absolute() if out else workdir / f"samples_{step}"
    folder.mkdir(parents=True, exist_ok=True)
    with logs.replacing(folder / "samples.npz") as partial, open(partial, "wb") as file:
        np.savez(file, arr_0=images, labels=y)
    if jax.process_index() == 0:
        print(
            f"{num} samples of step {step} in {logs.duration(seconds)} (compilation included): {folder / 'samples.npz'}"
        )
        if images.dtype == np.uint8:
            logs.save_png(folder / "grid.png", logs.image_grid(images[:256]))
            print(f"grid: {folder / 'grid.png'}")
        else:
            print("they are latents, float32: this run's preparation has no decoder")
    return folder


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run.", required=True)
    flags.DEFINE_integer("num", 64, "Number of samples.")
    flags.DEFINE_list("labels", None, "Class labels, taken in turn; by default every class in turn.")
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed, on i and on its label.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the last.")
    flags.DEFINE_string("out", None, "Directory to write to; by default WORKDIR/samples_STEP.")
    flags.DEFINE_integer("weak_step", None, "Guide by the checkpoint of this earlier step, with cfg_scale.")
    flags.DEFINE_string("solver", None, f"One of {', '.join(sampling.SOLVERS)}.")
    flags.DEFINE_integer("steps", None, "Steps of the solver.")
    flags.DEFINE_float("cfg_scale", None, "Scale of classifier-free guidance; 1: none.")
    flags.DEFINE_list("guidance_interval", None, "lo,hi: guide while lo <= t <= hi; t = 1 is noise.")
    flags.DEFINE_integer("guidance_channels", None, "Guide the first so many channels only.")
    flags.DEFINE_string("diffusion", None, f"Of stochastic solvers, one of {', '.join(samplers.DIFFUSIONS)}.")
    flags.DEFINE_string("last_step_kind", None, f"Of stochastic solvers, one of {', '.join(samplers.LAST_STEPS)}.")
    flags.DEFINE_float("last_step", None, "Of stochastic solvers: the time at which the last step begins.")
    flags.DEFINE_float("rtol", None, "Of dopri5: the relative tolerance.")
    flags.DEFINE_float("atol", None, "Of dopri5: the absolute tolerance.")
    flags.DEFINE_float("eta", None, "Of ddim: 0 is deterministic, 1 has the posterior's variance.")
    flags.DEFINE_integer("batch_size", None, "Samples at a time, over all devices.")

    def main() -> None:
        """Read the flags and run."""
        values = flags.FLAGS
        given = {
            name: values[name].value
            for name in ("workdir", "num", "labels", "seed", "step", "out", "weak_step", *OVERRIDES)
        }
        for name, kind, count in [("labels", int, None), ("guidance_interval", float, 2)]:
            if given[name] is not None:
                given[name] = numbers(name, given[name], kind, count)
        run(**given)

    def numbers(name: str, texts: list[str], kind: type, count: int | None) -> tuple:
        """The values of a list flag; ConfigError if they are not numbers, or not `count` of them."""
        try:
            found = tuple(kind(text) for text in texts)
        except ValueError:
            raise ConfigError(f"--{name}={','.join(texts)}: must be numbers separated by commas") from None
        if count is not None and len(found) != count:
            raise ConfigError(f"--{name}={','.join(texts)}: must be {count} numbers")
        return found

    program.launch(main)
