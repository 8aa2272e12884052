"""Fashion-MNIST and MNIST from their published files: 60,000 grey images of 28 x 28 pixels, and 10,000 as `test`.

    train-images-idx3-ubyte  train-labels-idx1-ubyte  t10k-images-idx3-ubyte  t10k-labels-idx1-ubyte

Each may be packed with gzip (.gz). Fashion-MNIST (Xiao et al., arXiv 1708.07747) shows clothes, MNIST (LeCun et al.,
1998) handwritten digits; both have ten classes. The images get a black border of 2 pixels: 32 x 32.
"""

import hashlib
import zlib
from pathlib import Path

import numpy as np

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, local_path
from diversedit_jax.data.levels import Levels, flip, shrunk
from diversedit_jax.errors import DataError, check_machine
from diversedit_jax.reading import RegularFile
from diversedit_jax.registry import one_of

DEBIAN = "/usr/share/datasets/fashion-mnist"
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
SIDE, BORDER, NUM_CLASSES = 28, 2, 10
CLASSES = {
    "Fashion-MNIST": ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"),
}
MD5 = {  # of the unpacked images and labels
    "Fashion-MNIST": {
        "train": ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"),
        "test": ("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
    },
    "MNIST": {
        "train": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
        "test": ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
    },
}


def make(split: str, *, data_dir: str = DEBIAN, size: int = 32, mirror: bool = False) -> Dataset:
    """The images in `data_dir`: `x` float32 [size size 1] in [-1, 1], and `y`.

    data_dir: a folder with the four files. By default where Debian's package dataset-fashion-mnist has them.
    size: 32, or 16 or 8: means of 2 x 2 or 4 x 4 pixels. mirror: each draw takes the mirror image with probability 1/2.

    DataError if files are missing, or are neither Fashion-MNIST nor MNIST.
    """
    name, count = SPLITS[one_of("fashion: split", split, SPLITS)]
    folder = local_path("fashion", data_dir)
    parts = {"images-idx3": 16 + count * SIDE * SIDE, "labels-idx1": 8 + count}
    contents = [_content(folder / f"{name}-{part}-ubyte", nbytes) for part, nbytes in parts.items()]
    found = tuple(hashlib.md5(content, usedforsecurity=False).hexdigest() for content in contents)
    sets = {sums[split]: name for name, sums in MD5.items()}
    if found not in sets:
        raise DataError(
            f"fashion: {folder} holds neither {' nor '.join(MD5)}: md5 of its {name} images and labels: "
            f"{' '.join(found)}; they are damaged, or of another version or two sets"
        )
    images = np.frombuffer(contents[0], np.uint8, offset=16).reshape(count, SIDE, SIDE, 1)
    images = np.pad(images, ((0, 0), (BORDER, BORDER), (BORDER, BORDER), (0, 0)))
    labels = np.frombuffer(contents[1], np.uint8, offset=8).astype(np.int32)
    levels = Levels(shrunk("fashion: size", images, size), labels)
    space = Space(levels.images.shape[1:], Conditions.labels(NUM_CLASSES, CLASSES.get(sets[found], ())))
    return Dataset(levels, flip if mirror else None, space)


def _content(path: Path, nbytes: int) -> bytes:
    """What a file holds, at most one byte more than it should."""
    packed = path.with_name(f"{path.name}.gz")
    place = packed if packed.exists() and not path.exists() else path
    try:
        with RegularFile(place) as file:
            content = file.read()
        if place == packed:
            content = zlib.decompressobj(zlib.MAX_WBITS + 16).decompress(content, nbytes + 1)
    except FileNotFoundError:
        remedy = "on Debian and Ubuntu: apt-get install dataset-fashion-mnist"
        raise DataError(f"fashion: neither {path} nor {packed.name} beside it; {remedy}") from None
    except (OSError, zlib.error) as error:
        check_machine(error)
        raise DataError(f"fashion: cannot read {place}: {error}") from error
    if len(content) != nbytes:
        least = "more than " if len(content) > nbytes else ""
        raise DataError(f"fashion: {place} has {least}{min(len(content), nbytes)} bytes, wanted {nbytes}")
    return content
