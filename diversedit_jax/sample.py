"""Sample from a trained run, or from the weights of a public release.

    python -m diversedit_jax.sample --workdir=DIR --num=64 --cfg_scale=1.8 --guidance_interval=0,0.7
    python -m diversedit_jax.sample --checkpoint=SiT-XL-2-256.pt --family=official_sit --vae=sd-vae-ft-ema --num=8

Uses EMA weights. Where no flag says otherwise a run samples by its own sampler, a release by the papers' (SDE or DDPM,
250 steps; MeanFlow 1 step). Writes DIR/samples_STEP (or what --out says): grid.png, and samples.npz with `arr_0`, uint8
images [n h w c], which the ADM evaluator reads, and `labels`. Latents are decoded by --vae, or by config.codec.vae
of the run; without it they stay float32.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from diversedit_jax.errors import ConfigError
from diversedit_jax.runs import trained
from diversedit_jax.runs.trained import Source
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import replacing
from diversedit_jax.runtime.pictures import image_grid, save_png
from diversedit_jax.runtime.progress import duration
from diversedit_jax.sampling import sampler


def run(
    source: Source, *, num: int = 64, labels: Sequence[int] | None = None, seed: int = 0, out: str | Path | None = None
) -> Path:
    """Write `num` samples, of `labels` in turn (default: every class in turn); returns the folder."""
    if num < 1:
        raise ConfigError(f"num = {num}: must be positive")
    known = sampler.known_labels(source.num_classes)
    chosen = known if labels is None else np.array(labels)
    if chosen.size == 0 or chosen.min() < 0 or chosen.max() > known[-1]:
        raise ConfigError(f"labels must be in 0 .. {known[-1]}, given {', '.join(map(str, chosen))}")
    y = np.resize(chosen, num).astype(np.int32)
    begin = time.monotonic()
    images = source.sample(source.params, source.frozen, y, seed, source.weak)
    seconds = time.monotonic() - begin

    folder = Path(out).expanduser().absolute() if out else source.folder
    if jax.process_index() != 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "samples.npz") as partial, open(partial, "wb") as file:
        np.savez(file, arr_0=images, labels=y)
    took = f"{duration(seconds)} (compilation included)"
    print(f"{num} samples of {source.name} in {took}: {folder / 'samples.npz'}")
    if images.dtype == np.uint8:
        save_png(folder / "grid.png", image_grid(images[:256]))
        print(f"grid: {folder / 'grid.png'}")
    else:
        print("they are latents, float32: --vae=FILE decodes them")
    return folder


if __name__ == "__main__":
    trained.define_flags()
    flags.adopt_module_key_flags(trained)  # so that --help lists them
    flags.DEFINE_integer("num", 64, "Number of samples.")
    flags.DEFINE_list("labels", None, "Class labels, taken in turn; by default every class in turn.")
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed, on i and on its label.")
    flags.DEFINE_string("out", None, "Directory to write to.")

    def main() -> None:
        """Read the flags and run."""
        labels = flags.FLAGS.labels
        labels = None if labels is None else trained.numbers("labels", labels, int)
        options = {name: flags.FLAGS[name].value for name in ("num", "seed", "out")}
        run(trained.from_flags(), labels=labels, **options)

    cli.launch(main, several=True)
