"""Compute the statistics of real images that samples are compared with.

    python -m tools.reference_stats IMAGES OUT.npz --extractor=inception=FILE
    python -m diversedit_jax.evaluate --workdir=DIR --reference=OUT.npz --extractor=inception=FILE

IMAGES is a folder of images, with or without class folders, WebDataset .tar files, a .zip, a tfds dataset in
array_record files, or an .npz with `arr_0`. Each image is cropped and resized to --size as ADM does, or with
--crop=lanczos as U-ViT does for MS-COCO; those of an .npz stay as they are. OUT holds:

- mu, sigma, mu_s and sigma_s of all images, under the names that torch-fidelity, pytorch-fid and ADM's script read;
- the features of --features images, for precision, recall and kernel distance;
- --images images, which ADM's script needs;
- a record of how it was made.

To compare with a paper, use its reference: for ImageNet, VIRTUAL_imagenet256_labeled.npz. An unreadable image is an
error, because fewer images make another reference.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from diversedit_jax import __version__, sharding
from diversedit_jax.data import image_collections, local_path
from diversedit_jax.data.image_collections import ImageFiles
from diversedit_jax.errors import ConfigError, DataError, MachineError
from diversedit_jax.evaluation import extractors, image_files, reference_statistics, scoring
from diversedit_jax.evaluation.extractors import Extractor
from diversedit_jax.registry import in_range
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import writable_folder, write_npz
from diversedit_jax.runtime.progress import Ticker, done, say

AHEAD = 512  # crops decoded ahead


class Images(NamedTuple):
    """`count` images in the order of their collection, which lies at `path`, and a record of their origin."""

    path: Path
    count: int
    stream: Iterator[np.ndarray]
    about: dict[str, Any]


def collection(
    path: str | Path, size: int, num: int | None, kind: str | None, split: str | None, threads: int, crop: str = "adm"
) -> Images:
    """The crops of `num` images at `path`, evenly spread over their order; None: of all. crop: one of CROPS."""
    path = local_path("images", path)
    if path.suffix in (".npz", ".npy"):
        found = image_files.open_samples(path)
        numbers = chosen(found.count, num)
        about = {"name": path.name, "crop": None, "size": list(found.shape[:2]), "of": found.count}
        return Images(found.path, len(numbers), (found.read(int(number), 1)[0] for number in numbers), about)
    opened = image_collections.open_images(path, kind, split, unconditional=True)
    numbers = chosen(len(opened), num)
    split = split or "train" if opened.kind == "tfds" else split
    about = {"name": path.name, "kind": opened.kind, "split": split, "crop": crop, "size": [size, size]}
    about |= {"of": len(opened), "ignored": dict(opened.ignored)}
    return Images(opened.path, len(numbers), _decoded(opened, numbers, size, threads, crop), about)


def chosen(count: int, num: int | None) -> np.ndarray:
    """`num` of the numbers below `count`, evenly spread; None: all."""
    return np.arange(count) if num is None or num >= count else np.arange(num) * count // max(num, 1)


def _decoded(images: ImageFiles, numbers: np.ndarray, size: int, threads: int, crop: str) -> Iterator[np.ndarray]:
    """Crops, decoded ahead by threads. DataError names an image that cannot be read."""
    with (
        ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool,
        contextlib.closing(image_collections.crops_ahead(images, numbers.tolist(), size, pool, AHEAD, crop)) as ahead,
    ):
        for index, future in ahead:
            try:
                yield future.result()
            except (OSError, MachineError) as error:
                raise DataError(f"{images.keys[index]}: {str(error) or type(error).__name__}") from error


def compute(
    images: Images, networks: Sequence[Extractor], batch: int, features: int, stored: int
) -> dict[str, np.ndarray]:
    """The arrays of the file. features, stored: how many images, evenly spread, keep their features or pixels."""
    extract = scoring.extraction(networks, sharding.make(), batch)
    if images.count < 2:
        raise DataError(f"{images.about['name']}: statistics need at least two images, given {images.count}")
    kept, kept_images = (set(chosen(images.count, n).tolist()) for n in (features, stored))
    totals: dict[str, scoring.Totals] = {one.name: scoring.Totals() for one in networks}
    single: dict[str, list[np.ndarray]] = {one.name: [] for one in networks}
    whole, done = [], 0
    with Ticker(images.count, "images") as ticker:
        while part := list(islice(images.stream, batch)):
            if done == 0:
                scoring.features_of(networks, part[0].shape)  # raises before anything compiles
            found = extract(np.stack(part))
            rows = [row for row in range(len(part)) if done + row in kept]
            for name, features_of in found.items():
                totals[name] = totals[name].plus(features_of)
                single[name].append(features_of.pool[rows])
            whole += [image for row, image in enumerate(part) if done + row in kept_images]
            done += len(part)
            ticker.update(len(part))
    arrays: dict[str, np.ndarray] = {}
    for name, total in totals.items():
        prefix = "" if name == "inception" else f"{name}/"
        arrays |= {f"{prefix}mu": total.pool.mean, f"{prefix}sigma": total.pool.covariance}
        if total.spatial is not None:
            arrays |= {f"{prefix}mu_s": total.spatial.mean, f"{prefix}sigma_s": total.spatial.covariance}
        if kept:
            arrays[f"{prefix}features"] = np.concatenate(single[name])
    return arrays | ({image_files.ARRAY: np.stack(whole)} if whole else {})


def write(out: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    write_npz(out, {**arrays, reference_statistics.ABOUT: np.array(json.dumps(about))})


if __name__ == "__main__":
    flags.DEFINE_multi_string("extractor", [], "NAME=FILE or NAME=FILE,OPTION=VALUE; may be given several times.")
    flags.DEFINE_integer("size", 256, "Side of the crops, in pixels.")
    flags.DEFINE_integer("num", None, "Number of images to use, evenly spread; by default all.")
    flags.DEFINE_integer("features", 10_000, "Number of images whose features are kept.")
    flags.DEFINE_integer("images", 0, "Number of images to store too.")
    flags.DEFINE_enum("kind", None, list(image_collections.KINDS), "What IMAGES is; by default it is recognised.")
    flags.DEFINE_string("split", None, "Split of a tfds dataset, or a subfolder of this name; by default train.")
    flags.DEFINE_enum("crop", "adm", list(image_collections.CROPS), "As ADM does, or a square and Lanczos (MS-COCO).")
    flags.DEFINE_integer("batch_size", 256, "Images at a time, over all devices.")
    flags.DEFINE_integer("threads", 0, "Threads that decode and crop; 0: two for each core.")

    def main(arguments: list[str]) -> None:
        """Read the flags and run."""
        given = flags.FLAGS
        if len(arguments) != 2:
            raise ConfigError("give IMAGES and OUT.npz")
        for name, least in (("size", 1), ("batch_size", 1), ("num", 2), ("features", 0), ("images", 0)):
            if given[name].value is not None:
                in_range(f"--{name}", given[name].value, least)
        begin, out = time.monotonic(), local_path("OUT", arguments[1])
        if out.suffix != ".npz":
            raise ConfigError(f"OUT must end in .npz, given {out}")
        named = cli.named_files("extractor", given.extractor)
        if not named:
            raise ConfigError("--extractor is required, such as --extractor=inception=FILE")
        writable_folder(out.parent, "OUT")  # fail now, not after an hour of work
        networks = [extractors.make(name, **options) for name, options in named.items()]
        images = collection(arguments[0], given.size, given.num, given.kind, given.split, given.threads, given.crop)
        ignored = "".join(f", ignored {count} x {what}" for what, count in images.about.get("ignored", {}).items())
        say(f"{images.count} images of {images.path}{ignored}")
        arrays = compute(images, networks, given.batch_size, given.features, given.images)
        about = images.about | {"count": images.count, "tool": f"diversedit_jax {__version__}"}
        about["extractors"] = {one.name: dict(one.about) for one in networks}
        write(out, arrays, about)
        for name, array in arrays.items():
            print(f"  {name:<20}{list(array.shape)} {array.dtype}")
        done(time.monotonic() - begin, {"statistics": out})

    cli.launch(main, arguments=True)
