"""Handwritten digits, 8x8 grey levels in ten classes: real images that need no download.

scikit-learn bundles them: 1,797 images with levels 0 .. 16, the test part of "Optical Recognition of Handwritten
Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49). The first use writes
them as a tfds data set, `<data_dir>/digits/1.0.0`; later runs read that.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from diversedit_jax.api import Conditions, Space
from diversedit_jax.data import Dataset, local_path
from diversedit_jax.errors import ConfigError, DataError, check_machine
from diversedit_jax.registry import one_of

SHAPE = (8, 8, 1)
NUM_CLASSES = 10
MAX_LEVEL = 16
SIZES = {"train": 1437, "test": 360}


def held_out(labels: np.ndarray) -> np.ndarray:
    """The rows of the 360 held-out images, 35 to 37 of each class, always the same."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    return np.sort(train_test_split(rows, test_size=SIZES["test"], stratify=labels, random_state=0)[1])


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The tfds dataset: `image` uint8 [8 8 1] with levels 0 .. 16, `label` int32, splits `train` and `test`."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # with a path, tfds looks for checksums there, by a package that is not installed

    def _info(self):
        image = tfds.features.Tensor(shape=SHAPE, dtype=np.uint8, encoding="bytes")
        features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.Scalar(np.int32)})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        digits = load_digits()
        test = held_out(digits.target)
        rows = {"train": np.setdiff1d(np.arange(len(digits.target)), test), "test": test}
        return {split: self._generate_examples(digits, rows[split]) for split in rows}

    def _generate_examples(self, digits, rows):
        for row in rows:
            image = digits.images[row].astype(np.uint8).reshape(SHAPE)
            yield int(row), {"image": image, "label": np.int32(digits.target[row])}


def build(data_dir: Path) -> Path:
    """The directory of the built data set, which is built now if it is missing.

    One rename moves the finished files to their place. A build that is killed leaves a `building-*` directory that
    nobody reads. Of two builds at the same time, the later uses the files of the earlier.
    """
    home = data_dir / "digits"
    place = home / str(Digits.VERSION)
    if place.is_dir():
        return place
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix="building-", ignore_cleanup_errors=True) as beside:
            builder = Digits(data_dir=beside, file_format="array_record")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                builder.download_and_prepare()  # tfds announces each step and draws progress bars
            with contextlib.suppress(OSError):
                os.rename(builder.data_path, place)
    except OSError as error:
        raise ConfigError(f"digits: cannot write to data_dir {data_dir}: {error}") from error
    if not place.is_dir():
        raise ConfigError(f"digits: cannot write {place}: another file has this name")
    return place


def levels(split: str, data_dir: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [n 8 8 1] with levels 0 .. 16, and labels, int32 [n], of `train` (n = 1437) or `test` (360)."""
    one_of("digits: split", split, SIZES)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = build(local_path("digits", data_dir or cache / "diversedit_jax"))
    try:
        source = tfds.builder_from_directory(str(place)).as_data_source(split)
        examples = source.__getitems__(range(len(source)))
        images = np.stack([example["image"] for example in examples])
        labels = np.array([example["label"] for example in examples], np.int32)
        if images.shape != (SIZES[split], *SHAPE):
            raise ValueError(f"{split} has images {images.shape}, wanted {(SIZES[split], *SHAPE)}")
    except Exception as error:  # array_record and tfds raise many kinds
        check_machine(error)
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"digits: {place} is damaged ({cause}); delete it and it is built anew") from error
    return images, labels


def spread(example: dict, rng: np.random.Generator) -> dict:
    """Add uniform noise of one level's width, 1/8, to `x`. This makes its density finite."""
    noise = rng.uniform(-0.5, 0.5, example["x"].shape).astype(np.float32)
    return example | {"x": example["x"] + noise / 8}


def make(split: str, *, data_dir: str | None = None, dequantize: bool = True) -> Dataset:
    """The digits: `x` float32 [8 8 1] in [-1, 1] and `y` int32; 1,437 to train on, 360 held out as `test`.

    data_dir: where the data set is built and read; by default `$XDG_CACHE_HOME/diversedit_jax`, or below `~/.cache`.
    dequantize: add uniform noise of one level's width to each draw.
    """
    images, labels = levels(split, data_dir)
    x = images.astype(np.float32) / (MAX_LEVEL / 2) - 1
    source = [{"x": image, "y": label} for image, label in zip(x, labels, strict=True)]
    return Dataset(source, spread if dequantize else None, Space(SHAPE, Conditions.labels(NUM_CLASSES)))
