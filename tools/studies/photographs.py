"""Write a folder of real images without a download: crops of photographs from scikit-image and scikit-learn.

    python -m tools.studies.photographs OUT [--size=32] [--num=3200]

Writes OUT/NAME/0000.png, with a class for each photograph. Crops are squares of random place and size. The same options
give the same files. These data show that everything works, not how well.
"""

import importlib.util
import zlib
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from diversedit_jax.data.image_collections import FORMATS
from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import in_range
from diversedit_jax.runtime import cli

SAME_NAME = ("astronaut", "brick", "camera", "coffee", "coins", "grass", "gravel", "moon")
PHOTOGRAPHS = {name: ("skimage", f"data/{name}.png") for name in SAME_NAME} | {  # class: (package, file)
    "cat": ("skimage", "data/chelsea.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
EXTENT = (0.25, 0.6)  # side of a crop over the photograph's shorter side


def photograph(name: str) -> Image.Image:
    """Read a photograph in RGB from the package that bundles it. The package is not imported."""
    package, file = PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec else None
    if path is None or not path.is_file():
        reason = f"but {path} is missing" if path else "which is not installed"
        raise ConfigError(f"{name} is a picture of {package}, {reason}: pip install -e .[test]")
    with Image.open(path, formats=FORMATS) as image:
        return image.convert("RGB")


def crops(name: str, size: int, count: int) -> list[Image.Image]:
    """Cut the first `count` crops of a photograph, size x size pixels."""
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
    """Write crops of all photographs into class folders, and return how many."""
    in_range("--size", size, 1)
    in_range("--num", num, len(PHOTOGRAPHS))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not an empty folder: images in it would count as data too")
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
        """Read the arguments and write the crops."""
        if len(arguments) != 1:
            raise ConfigError("usage: python -m tools.studies.photographs OUT; --help says more")
        count = write(Path(arguments[0]).expanduser(), flags.FLAGS.size, flags.FLAGS.num)
        print(f"{count} crops of {len(PHOTOGRAPHS)} photographs in {arguments[0]}")

    cli.launch(main, arguments=True)
