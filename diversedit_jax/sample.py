"""Sample from a trained run, or from the weights of a public release.

    python -m diversedit_jax.sample --workdir=DIR --num=64 --cfg_scale=1.8 --guidance_interval=0,0.7
    python -m diversedit_jax.sample --checkpoint=SiT-XL-2-256.pt --family=official_sit --vae=sd-vae-ft-ema --num=8

Samples use the EMA weights. By default a run uses its own sampler, and a release that of its paper (SDE or DDPM, 250
steps; MeanFlow, 1 step). Files in DIR/samples_STEP, or in --out: grid.png, and samples.npz with `labels` and `arr_0`,
uint8 images [n h w c], as the ADM evaluator reads them. --vae, or config.codec.vae of the run, decodes latents; without
it they stay float32.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from diversedit_jax import sharding
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import INT32, in_range
from diversedit_jax.runs import flags as run_flags
from diversedit_jax.runs.trained import Source
from diversedit_jax.runtime import cli, files, pictures
from diversedit_jax.runtime.progress import Ticker, done, say
from diversedit_jax.sharding import by_name


def run(
    source: Source, *, num: int = 64, labels: Sequence[int] | None = None, seed: int = 0, out: str | Path | None = None
) -> Path:
    """Write `num` samples; returns the folder.

    labels: to repeat in turn. None: every class in turn, or the conditions of held-out data.
    """
    in_range("num", num, 1, INT32)
    y = source.conditions(None, num, seed) if labels is None else repeated(labels, num, source.space.conditions.classes)
    begin = time.monotonic()
    if jax.process_index() == 0:
        say(f"sampling {source.name}: {num} samples, {source.options['solver']}, {source.options['steps']} steps")
    with Ticker(num) as ticker:
        size = sharding.filled(min(source.options["batch_size"], num))

        def between() -> None:
            ticker.update(min(size, num - ticker.done))

        images = source.sampler(source.params, source.frozen, y, seed, source.weak, between=between)
    folder = Path(out).expanduser().absolute() if out else source.folder
    if jax.process_index() != 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    named = {"labels": y} if isinstance(y, np.ndarray) else {f"condition/{name}": x for name, x in by_name(y).items()}
    files.write_npz(folder / "samples.npz", {"arr_0": images, **named})
    places = {"samples": folder / "samples.npz"}
    if images.dtype == np.uint8:
        names = source.space.conditions.named(y)
        grid = pictures.image_grid(pictures.as_pictures(images[:256]), names=names and names[:256])
        pictures.save_png(folder / "grid.png", grid)
        places["grid"] = folder / "grid.png"
    else:
        say("the samples are latents, float32: --vae=FILE decodes them")
    done(time.monotonic() - begin, places, f"{num} samples of {source.name}")
    return folder


def repeated(labels: Sequence[int], num: int, classes: int | None) -> np.ndarray:
    """These labels in turn. ConfigError for a label that the data do not have."""
    if classes is None:
        raise ConfigError("--labels: the conditions of these data are not labels. Leave it out for held-out conditions")
    last = max(classes, 1) - 1
    if not len(labels) or min(labels) < 0 or max(labels) > last:
        raise ConfigError(f"labels must be in 0 .. {last}, given {', '.join(map(str, labels))}")
    return np.resize(np.array(labels), num).astype(np.int32)


if __name__ == "__main__":
    run_flags.define_flags()
    flags.adopt_module_key_flags(run_flags)
    flags.DEFINE_integer("num", 64, "Number of samples.")
    flags.DEFINE_list("labels", None, "Class labels, taken in turn; by default every class in turn.")
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed, on i and on its label.")
    flags.DEFINE_string("out", None, "Directory to write to.")

    def main() -> None:
        """Read the flags and run."""
        given = flags.FLAGS
        labels = None if given.labels is None else run_flags.numbers("labels", given.labels, int)
        run(run_flags.source(), num=given.num, labels=labels, seed=given.seed, out=given.out)

    cli.launch(main, several=True, groups=run_flags.GROUPS)
