"""A folder of real images without a download: crops of the photographs that scikit-image and scikit-learn bundle.

    python -m tools.studies.photographs OUT [--size=32] [--num=3200]

OUT/NAME/0000.png, a class for each photograph: astronaut, cat, coffee, ... Crops are squares of random place and
extent; the same options give the same files. As data they show that everything works, not how well.
"""

import importlib.util
import zlib
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from diversedit_jax.errors import ConfigError
from diversedit_jax.runtime import cli

# class: (package, the file in it)
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
EXTENT = (0.25, 0.6)  # of a crop, as a part of the photograph's shorter side


def photograph(name: str) -> Image.Image:
    """A photograph in RGB, read from the package that bundles it; nothing of the package is imported."""
    package, file = PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ConfigError(f"{name} is a picture of {package}, which is not installed: pip install -e .[test]")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ConfigError(f"{name} is a picture of {package}, but {path} is missing: pip install -e .[test]")
    with Image.open(path) as image:
        return image.convert("RGB")


def crops(name: str, size: int, count: int) -> list[Image.Image]:
    """The first `count` crops of a photograph, size x size pixels."""
    image = photograph(name)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    found = []
    for _ in range(count):
        side = round(min(image.size) * rng.uniform(*EXTENT))
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        box = (left, top, left + side, top + side)
        found.append(image.resize((size, size), Image.Resampling.LANCZOS, box=box))
    return found


def write(out: Path, size: int, num: int) -> int:
    """Write crops of all photographs into class folders; returns how many."""
    if size < 1 or num < len(PHOTOGRAPHS):
        raise ConfigError(f"size = {size}, num = {num}: wanted a positive size and at least {len(PHOTOGRAPHS)} crops")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: crops of before would count as data too")
    each = num // len(PHOTOGRAPHS)
    for name in PHOTOGRAPHS:
        (out / name).mkdir(parents=True, exist_ok=True)
        for number, crop in enumerate(crops(name, size, each)):
            crop.save(out / name / f"{number:04d}.png")
    return each * len(PHOTOGRAPHS)


if __name__ == "__main__":
    flags.DEFINE_integer("size", 32, "Side of the crops, in pixels.")
    flags.DEFINE_integer("num", 3200, "Number of crops, over all classes.")

    def main(arguments: list[str]) -> None:
        """Write them."""
        if len(arguments) != 1:
            raise ConfigError("usage: python -m tools.studies.photographs OUT; --help says more")
        count = write(Path(arguments[0]).expanduser(), flags.FLAGS.size, flags.FLAGS.num)
        print(f"{count} crops of {len(PHOTOGRAPHS)} photographs in {arguments[0]}")

    cli.launch(main, arguments=True)
