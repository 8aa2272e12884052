"""Statistics of real images, for samples to be compared with.

    python -m tools.reference_stats IMAGES OUT.npz --extractor=inception=FILE
    python -m diversedit_jax.evaluate --workdir=DIR --reference=OUT.npz --extractor=inception=FILE

IMAGES is a folder of images, with or without class folders, WebDataset .tar files, a .zip, a tfds dataset in
array_record files, or an .npz with `arr_0`. Each image is cropped and resized as ADM does, to --size (an .npz is taken
as it is). OUT holds mu, sigma, mu_s and sigma_s of all images, as torch-fidelity, pytorch-fid and the script of ADM
read them, features of --features images for precision, recall and kernel distance, and how all of it was made. With
--images so many images are stored too, which the script of ADM needs.

Scores compare between papers only if the reference is theirs: for ImageNet that is VIRTUAL_imagenet256_labeled.npz.
Images that cannot be read are an error, as a reference of fewer images is another reference.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from diversedit_jax import __version__, sharding
from diversedit_jax.data import image_collections, local_path
from diversedit_jax.errors import ConfigError, DataError
from diversedit_jax.evaluation import extractors, image_files, reference_statistics, scoring
from diversedit_jax.evaluation.extractors import Extractor
from diversedit_jax.runtime import cli
from diversedit_jax.runtime.files import write_npz
from diversedit_jax.runtime.progress import Ticker

AHEAD = 512  # crops that are decoded before they are needed


class Images(NamedTuple):
    """`count` images in the order of their collection, and what they are."""

    count: int
    stream: Iterator[np.ndarray]
    about: dict[str, Any]


def collection(path: str | Path, size: int, num: int | None, kind: str | None, split: str, threads: int) -> Images:
    """The images at `path`, cropped; of them `num`, evenly spread over the order."""
    path = local_path("images", path)
    if path.suffix in (".npz", ".npy"):
        found = image_files.open_samples(path)
        numbers = chosen(found.count, num)
        stream = (found.read(int(number), 1)[0] for number in numbers)
        about = {"name": path.name, "crop": None, "size": list(found.shape[:2])}
        return Images(len(numbers), stream, about | {"of": found.count})
    opened = image_collections.open_images(path, kind, split, unconditional=True)
    numbers = chosen(len(opened), num)
    about = {"name": path.name, "kind": opened.kind, "split": split, "crop": "adm", "size": [size, size]}
    about |= {"of": len(opened), "ignored": dict(opened.ignored)}
    return Images(len(numbers), _decoded(opened, numbers, size, threads), about)


def chosen(count: int, num: int | None) -> np.ndarray:
    """`num` of `count` numbers, evenly spread: the same on every machine."""
    return np.arange(count) if num is None or num >= count else np.arange(num) * count // max(num, 1)


def _decoded(
    images: image_collections.ImageFiles, numbers: np.ndarray, size: int, threads: int
) -> Iterator[np.ndarray]:
    """Crops, decoded ahead by threads. DataError, with its name, for an image that cannot be read."""
    with (
        ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool,
        contextlib.closing(image_collections.crops_ahead(images, numbers.tolist(), size, pool, AHEAD)) as ahead,
    ):
        for index, future in ahead:
            try:
                yield future.result()
            except (OSError, MemoryError) as error:
                raise DataError(f"{images.keys[index]}: {str(error) or type(error).__name__}") from error


def compute(
    images: Images, networks: Sequence[Extractor], batch: int, features: int, stored: int
) -> dict[str, np.ndarray]:
    """The arrays of the file: of all images statistics, of evenly spread ones their features and they themselves."""
    extract = scoring.extraction(networks, sharding.make(), batch)
    if images.count < 2:
        raise DataError(f"{images.about['name']}: statistics need at least two images, given {images.count}")
    kept, kept_images = (set(chosen(images.count, n).tolist()) for n in (features, stored))
    totals: dict[str, scoring.Totals] = {one.name: scoring.Totals() for one in networks}
    single: dict[str, list[np.ndarray]] = {one.name: [] for one in networks}
    whole, done = [], 0
    with Ticker(images.count) as ticker:
        while part := list(islice(images.stream, batch)):
            if done == 0:
                scoring.features_of(networks, part[0].shape)  # says what cannot work before anything compiles
            found = extract(np.stack(part))
            rows = [row for row in range(len(part)) if done + row in kept]
            for name, part_of in found.items():
                totals[name] = totals[name].plus(part_of)
                single[name].append(part_of.pool[rows])
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
    """The file, whole or not at all."""
    write_npz(out, {**arrays, reference_statistics.ABOUT: np.array(json.dumps(about))})


if __name__ == "__main__":
    flags.DEFINE_multi_string("extractor", [], "NAME=FILE or NAME=FILE,OPTION=VALUE; may be given several times.")
    flags.DEFINE_integer("size", 256, "Pixels of a side.")
    flags.DEFINE_integer("num", None, "Use so many images, evenly spread; by default all.")
    flags.DEFINE_integer("features", 10_000, "Keep the features of so many images; 0: of none.")
    flags.DEFINE_integer("images", 0, "Store so many images too.")
    flags.DEFINE_enum("kind", None, list(image_collections.KINDS), "Of IMAGES, where it is not clear.")
    flags.DEFINE_string("split", "train", "Of a tfds dataset, or the subfolder of this name.")
    flags.DEFINE_integer("batch_size", 256, "Images at a time, over all devices.")
    flags.DEFINE_integer("threads", 0, "That decode; 0: two for each core.")

    def main(arguments: list[str]) -> None:
        """Read the flags and run."""
        given = flags.FLAGS
        if len(arguments) != 2:
            raise ConfigError("give IMAGES and OUT.npz")
        for name, least in (("size", 1), ("batch_size", 1), ("num", 2), ("features", 0), ("images", 0)):
            if given[name].value is not None and given[name].value < least:
                raise ConfigError(f"--{name}={given[name].value}: must be at least {least}")
        out = local_path("OUT", arguments[1])
        if out.suffix != ".npz":
            raise ConfigError(f"OUT must end in .npz, given {out}")
        named = cli.named_files("extractor", given.extractor)
        if not named:
            raise ConfigError("give a feature network: --extractor=inception=FILE")
        try:  # now, not after an hour of work
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"OUT: cannot make {out.parent}: {error.strerror}") from error
        if not os.access(out.parent, os.W_OK):
            raise ConfigError(f"OUT: cannot write to {out.parent}")
        networks = [extractors.make(name, **options) for name, options in named.items()]
        images = collection(arguments[0], given.size, given.num, given.kind, given.split, given.threads)
        beside = "".join(f", beside {count} x {what}" for what, count in images.about.get("ignored", {}).items())
        print(f"{images.count} images of {arguments[0]}{beside}", flush=True)
        arrays = compute(images, networks, given.batch_size, given.features, given.images)
        about = images.about | {"count": images.count, "tool": f"diversedit_jax {__version__}"}
        about["extractors"] = {one.name: dict(one.about) for one in networks}
        write(out, arrays, about)
        for name, array in arrays.items():
            print(f"  {name:<20}{list(array.shape)} {array.dtype}")
        print(f"written to {out}")

    cli.launch(main, arguments=True)
