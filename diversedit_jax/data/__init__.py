"""Data sets on the host: numpy, grain and tfds, never jax arrays."""

from pathlib import Path
from typing import Any, NamedTuple

from diversedit_jax import registry
from diversedit_jax.errors import ConfigError


class Dataset(NamedTuple):
    """A finite set of examples with random access, and the random transform of one example.

    source:      examples by index: dict[str, np.ndarray], with `y` an int32 class label.
    transform:   (example, np.random.Generator) -> example; None if there is nothing to draw.
    shape:       (h, w, c) of the network's space.
    num_classes: labels are 0 .. num_classes - 1, and num_classes is the null label; 0 classes: every label is 0, which
                 is then the null label.
    scale:       of latents, as the autoencoder was trained for: the codec must have it; None if it is not known.
    """

    source: Any
    transform: Any
    shape: tuple[int, int, int]
    num_classes: int
    scale: float | None = None


def make(name: str, split: str, **options) -> Dataset:
    """The data set `name`, split `train` or `test`; the options are the keywords of `data.<name>.make`."""
    return registry.make("data", name, split, **options)


def local_path(what: str, given: str | Path) -> Path:
    """A path of this machine, `~` expanded. ConfigError, in the name of `what`, for a bucket.

    Libraries that read buckets themselves wait for ever where they cannot: a mount says at once what is wrong.
    """
    if "://" in str(given):
        raise ConfigError(
            f"{what}: {given} is not a path of this machine: mount the bucket (gcsfuse, mountpoint-s3) or copy it"
        )
    return Path(given).expanduser()
