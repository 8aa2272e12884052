"""Sample from a trained run, or from the weights of a public release.

    python -m diversedit_jax.sample --workdir=DIR --num=64 --cfg_scale=1.8 --guidance_interval=0,0.7
    python -m diversedit_jax.sample --checkpoint=SiT-XL-2-256.pt --family=official_sit --vae=sd-vae-ft-ema --num=8

Uses EMA weights. Where no flag says otherwise a run samples by its own sampler, a release by the papers' (SDE or DDPM,
250 steps; MeanFlow 1 step). Writes DIR/samples_STEP (or what --out says): grid.png, and samples.npz with `arr_0`, uint8
images [n h w c], which the ADM evaluator reads, and `labels`. Latents are decoded by --vae, or by config.prepare.vae
of the run; without it they stay float32.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from diversedit_jax import config as configs
from diversedit_jax import experiment, logs, models, prepare, program, samplers, sampling, sharding
from diversedit_jax.api import Params
from diversedit_jax.checkpoint import Checkpoints
from diversedit_jax.errors import ConfigError
from diversedit_jax.interop import releases

OVERRIDES = ("solver", "steps", "cfg_scale", "token_cfg_scale", "guidance_interval", "guidance_channels")
OVERRIDES += ("diffusion", "last_step_kind", "last_step", "rtol", "atol", "eta", "batch_size")


class Source(NamedTuple):
    """What is sampled from, ready to sample."""

    sample: sampling.Sample
    params: Params
    weak: Params | None  # of autoguidance
    frozen: Any
    num_classes: int
    name: str
    folder: Path


def of_run(
    workdir: str | Path,
    step: int | None = None,
    weak_step: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    vae: str | None = None,
) -> Source:
    """The run in `workdir` at `step`, by default the last. overrides: of `config.sampler`.

    vae: in place of config.prepare.vae, where latents are decoded.
    weak_step: guide by the run's own weights at this earlier step, with cfg_scale (autoguidance, arXiv 2406.02507).
    """
    workdir = Path(workdir).expanduser().absolute()
    config = configs.load(workdir)
    config.sampler.update(overrides or {})
    if vae is not None:
        if config.prepare.name != "latents":
            raise ConfigError(f"--vae={vae}: the run trains on {config.prepare.name}, not on latents")
        config.prepare.vae = vae
    config.encoders = ConfigDict()  # only losses read their features: sampling works without their files
    checkpoints = Checkpoints(workdir / "checkpoints")
    meta = checkpoints.meta(step)
    step = checkpoints.latest() if step is None else step
    mesh, parts, sample, _ = experiment.build(config, tuple(meta["shape"]), meta["num_classes"])
    target = experiment.abstract_params(parts.model, mesh)
    params, _ = checkpoints.restore_part(target, "ema", step)
    weak = None if weak_step is None else checkpoints.restore_part(target, "ema", weak_step)[0]
    frozen = experiment.prepared(parts.prepare, mesh)
    return Source(sample, params, weak, frozen, meta["num_classes"], f"step {step}", workdir / f"samples_{step}")


def of_release(
    file: str | Path,
    family: str | None = None,
    heads: int | None = None,
    weights: str | None = None,
    side: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    vae: str | None = None,
) -> Source:
    """The release in a weight file (see `interop.releases.open_release`). side: of its latents, where it stores none.

    overrides: of the sampler: options of `sampling.make`. vae: the autoencoder that decodes its latents.
    """
    file = Path(file).expanduser().absolute()
    release, _ = releases.open_release(file, family, heads, weights)
    arch, family = release.arch, release.family
    side = side or release.side
    if side is None:
        raise ConfigError(f"{file} does not store the side of its latents: give it with --side=N")
    shape = (side, side, arch.channels)
    name = "official_sit" if family == "official_sit" else "dit"
    model = models.make(name, shape, arch.num_classes, **releases.model_options(arch))
    options = dict(overrides or {})
    if family in ("official_dit", "diffusers_dit"):
        trained, options = sampling.Diffusion(), {"solver": "ddpm"} | options
    elif arch.second_time:
        trained = sampling.AverageVelocity()
        if options.get("solver", "mean_flow") == "mean_flow":
            options = {"solver": "mean_flow", "steps": 1} | options
    else:
        trained = sampling.Flow()
    mesh = sharding.make_mesh()
    latents = prepare.make("latents", vae=vae)
    sample = sampling.make(model, latents, shape, arch.num_classes, trained, mesh, **options)
    placed = sharding.shardings(release.params, mesh)
    params = jax.tree.map(jax.device_put, release.params, placed)
    folder = file.with_name(f"samples_{file.stem}")
    frozen = experiment.prepared(latents, mesh)
    return Source(sample, params, None, frozen, arch.num_classes, file.name, folder)


def run(
    source: Source, *, num: int = 64, labels: Sequence[int] | None = None, seed: int = 0, out: str | Path | None = None
) -> Path:
    """Write `num` samples, of `labels` in turn (default: every class in turn); returns the folder."""
    if num < 1:
        raise ConfigError(f"num = {num}: must be positive")
    known = sampling.known_labels(source.num_classes)
    chosen = known if labels is None else np.array(labels)
    if chosen.size == 0 or chosen.min() < 0 or chosen.max() > known[-1]:
        raise ConfigError(f"labels must be in 0 .. {known[-1]}, given {', '.join(map(str, chosen))}")
    y = np.resize(chosen, num).astype(np.int32)
    begin = time.monotonic()
    images = source.sample(source.params, source.frozen, y, seed, source.weak)
    seconds = time.monotonic() - begin

    folder = Path(out).expanduser().absolute() if out else source.folder
    folder.mkdir(parents=True, exist_ok=True)
    with logs.replacing(folder / "samples.npz") as partial, open(partial, "wb") as file:
        np.savez(file, arr_0=images, labels=y)
    if jax.process_index() == 0:
        took = f"{logs.duration(seconds)} (compilation included)"
        print(f"{num} samples of {source.name} in {took}: {folder / 'samples.npz'}")
        if images.dtype == np.uint8:
            logs.save_png(folder / "grid.png", logs.image_grid(images[:256]))
            print(f"grid: {folder / 'grid.png'}")
        else:
            print("they are latents, float32: --vae=FILE decodes them")
    return folder


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a run.")
    flags.DEFINE_string(
        "checkpoint", None, "Weights of a public release: .safetensors, .pt, .pth, or as flax and orbax write."
    )
    flags.DEFINE_enum("family", None, list(releases.FAMILIES), "What the release is, where its arrays do not tell.")
    flags.DEFINE_integer("heads", None, "Attention heads of the release, for a width that no published size has.")
    flags.DEFINE_string("weights", None, "Entry of the release's file: by default its EMA.")
    flags.DEFINE_integer("side", None, "Side of the release's latents, where it stores none.")
    flags.DEFINE_string("vae", None, "Autoencoder that decodes latents: a folder as diffusers writes it, or a file.")
    flags.DEFINE_integer("num", 64, "Number of samples.")
    flags.DEFINE_list("labels", None, "Class labels, taken in turn; by default every class in turn.")
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed, on i and on its label.")
    flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the last.")
    flags.DEFINE_string("out", None, "Directory to write to.")
    flags.DEFINE_integer("weak_step", None, "Guide by the checkpoint of this earlier step, with cfg_scale.")
    flags.DEFINE_string("solver", None, f"One of {', '.join(sampling.SOLVERS)}.")
    flags.DEFINE_integer("steps", None, "Steps of the solver.")
    flags.DEFINE_float("cfg_scale", None, "Scale of classifier-free guidance; 1: none.")
    flags.DEFINE_float("token_cfg_scale", None, "That of REG's class token; by default cfg_scale, <= 0: not guided.")
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
        values = {name: flags.FLAGS[name].value for name in flags.FLAGS}
        for name, kind, count in [("labels", int, None), ("guidance_interval", float, 2)]:
            if values[name] is not None:
                values[name] = numbers(name, values[name], kind, count)
        overrides = {name: values[name] for name in OVERRIDES if values[name] is not None}
        if (values["workdir"] is None) == (values["checkpoint"] is None):
            raise ConfigError("give --workdir=DIR of a run or --checkpoint=FILE of a release")
        if values["workdir"] is not None:
            source = of_run(values["workdir"], values["step"], values["weak_step"], overrides, values["vae"])
        else:
            about = (values[name] for name in ("checkpoint", "family", "heads", "weights", "side"))
            source = of_release(*about, overrides, values["vae"])
        run(source, **{name: values[name] for name in ("num", "labels", "seed", "out")})

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
