"""Sample from a trained run, or from the weights of a public release.

    python -m diversedit_jax.sample --workdir=DIR --num=64 --cfg_scale=1.8 --guidance_interval=0,0.7
    python -m diversedit_jax.sample --workdir=DIR --prompts="a red bus" --prompts="two dogs" --cfg_scale=2
    python -m diversedit_jax.sample --checkpoint=SiT-XL-2-256.pt --family=official_sit --vae=sd-vae-ft-ema --num=8

Samples use the EMA weights. By default a run uses its own sampler, and a release that of its paper (SDE or DDPM, 250
steps; MeanFlow, 1 step). Files in DIR/samples_STEP, or in --out: grid.png, for videos also grid.gif, and samples.npz
with `labels` and `arr_0`, uint8 images [n h w c], as the ADM evaluator reads them, or videos [n f h w c]; for texts
`prompts` and `condition`. --vae, or config.codec.vae of the run, decodes latents; without it they stay float32.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from diversedit_jax import sharding
from diversedit_jax.api import Condition
from diversedit_jax.errors import ConfigError, check_machine
from diversedit_jax.reading import RegularFile
from diversedit_jax.registry import INT32, in_range
from diversedit_jax.runs import flags as run_flags
from diversedit_jax.runs.trained import Source
from diversedit_jax.runtime import cli, files, pictures
from diversedit_jax.runtime.progress import Ticker, done, say
from diversedit_jax.sharding import by_name

NUM = 64  # of samples


def run(
    source: Source,
    *,
    num: int | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Path:
    """Write `num` samples; returns the folder.

    num: by default one for each prompt, else NUM.
    labels, prompts: to repeat in turn. None: every class in turn, or the conditions of held-out data.
    negative_prompt: guide away from it instead of from the empty text.
    """
    num = in_range("num", len(prompts) if num is None and prompts else NUM if num is None else num, 1, INT32)
    y = conditions(source, num, seed, labels, prompts)
    negative = None if negative_prompt is None else one(source.prompts([negative_prompt]))
    begin = time.monotonic()
    if jax.process_index() == 0:
        say(f"sampling {source.name}: {num} samples, {source.options['solver']}, {source.options['steps']} steps")
    with Ticker(num, source.space.kind) as ticker:
        size = sharding.filled(min(source.options["batch_size"], num))

        def between() -> None:
            ticker.update(min(size, num - ticker.done))

        images = source.sampler(source.params, source.frozen, y, seed, source.weak, negative=negative, between=between)
    folder = Path(out).expanduser().absolute() if out else source.folder
    if jax.process_index() != 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    names = source.named(y)
    if source.space.conditions.classes is not None:
        stored = {"labels": y}
    else:
        stored = {f"condition/{name}".rstrip("/"): x for name, x in by_name(y).items()}
        stored |= {"prompts": np.array(names)} if names else {}
    files.write_npz(folder / "samples.npz", {"arr_0": images, **stored})
    places = {"samples": folder / "samples.npz"}
    if images.dtype == np.uint8:
        grid = pictures.picture(images[:256], names and names[:256], source.space.video)
        places |= zip(("grid", "moving"), pictures.save(folder / "grid.png", grid), strict=False)
    else:
        say("the samples are latents, float32: --vae=FILE decodes them")
    done(time.monotonic() - begin, places, f"{num} samples of {source.name}")
    return folder


def conditions(
    source: Source, num: int, seed: int, labels: Sequence[int] | None = None, prompts: Sequence[str] | None = None
) -> Condition:
    """The stored conditions of `num` samples: labels or prompts in turn, or those of the source."""
    if labels is not None and prompts:
        raise ConfigError("give labels or prompts, not both")
    if prompts:
        y = source.prompts([prompts[i % len(prompts)] for i in range(min(num, len(prompts)))])
        return jax.tree.map(lambda leaf: leaf[np.arange(num) % len(leaf)], y)
    return (
        source.conditions(None, num, seed) if labels is None else repeated(labels, num, source.space.conditions.classes)
    )


def one(condition: Condition) -> Condition:
    """The condition of the first example, without a batch axis."""
    return jax.tree.map(lambda leaf: leaf[0], condition)


def lines(path: str | Path) -> list[str]:
    """The lines of a file of prompts. Empty ones are left out. ConfigError if there is none."""
    try:
        with RegularFile(Path(path).expanduser()) as file:
            found = [line.strip() for line in file.read().decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        check_machine(error)
        raise ConfigError(f"--prompts_file={path}: {' '.join(str(error).split())}") from error
    if not found:
        raise ConfigError(f"--prompts_file={path}: it has no prompt, wanted one on each line")
    return found


def repeated(labels: Sequence[int], num: int, classes: int | None) -> np.ndarray:
    """These labels in turn. ConfigError for a label that the data do not have."""
    if classes is None:
        raise ConfigError(
            "labels: the conditions of these data are not labels: give prompts if they are texts, or nothing"
        )
    last = max(classes, 1) - 1
    if not len(labels) or min(labels) < 0 or max(labels) > last:
        raise ConfigError(f"labels must be in 0 .. {last}, given {', '.join(map(str, labels))}")
    return np.resize(np.array(labels), num).astype(np.int32)


if __name__ == "__main__":
    run_flags.define_flags()
    flags.adopt_module_key_flags(run_flags)
    flags.DEFINE_integer("num", None, f"Number of samples; by default one for each prompt, else {NUM}.")
    flags.DEFINE_list("labels", None, "Class labels, taken in turn; by default every class in turn.")
    flags.DEFINE_multi_string("prompts", None, "A text to draw; may be repeated. Prompts are taken in turn.")
    flags.DEFINE_string("prompts_file", None, "A file with a prompt on each line.")
    flags.DEFINE_string("negative_prompt", None, "A text to guide away from; by default the empty one.")
    flags.DEFINE_integer("seed", 0, "Image i depends on the seed, on i and on its label or prompt.")
    flags.DEFINE_string("out", None, "Directory to write to.")

    def main() -> None:
        """Read the flags and run."""
        given = flags.FLAGS
        labels = None if given.labels is None else run_flags.numbers("labels", given.labels, int)
        prompts = [*(given.prompts or ()), *(lines(given.prompts_file) if given.prompts_file else ())]
        run(
            run_flags.source(),
            num=given.num,
            labels=labels,
            prompts=prompts or None,
            negative_prompt=given.negative_prompt,
            seed=given.seed,
            out=given.out,
        )

    cli.launch(main, several=True, groups=run_flags.GROUPS)
