"""Data sets on the host: numpy, grain and tfds, never jax arrays."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diversedit_jax import registry
from diversedit_jax.api import Space
from diversedit_jax.errors import ConfigError


class Dataset(NamedTuple):
    """A finite set of examples with random access, and the random transform of one example.

    source:    examples by index: dicts of numpy arrays. `y` is the condition, which may be nested dicts itself.
    transform: (example, np.random.Generator) -> example; None if there is nothing to draw.
    space:     shape and conditions of an example. Of stored latents the shape is that of the latents.
    scale:     of latents, as their autoencoder was trained for; the codec must have it. None if it is not known.
    """

    source: Any
    transform: Any
    space: Space
    scale: float | None = None


# make(name, split, **options): the data set `name`, split `train` or `test`; the options are the keywords of
# `data.<name>.make`.
make = partial(registry.make, "data")


def local_path(what: str, given: str | Path) -> Path:
    """A path of this machine, `~` expanded. ConfigError, in the name of `what`, for a bucket.

    Libraries that read buckets themselves wait for ever where they cannot: a mount says at once what is wrong.
    """
    if "://" in str(given):
        raise ConfigError(
            f"{what}: {given} is not a path of this machine: mount the bucket (gcsfuse, mountpoint-s3) or copy it"
        )
    return Path(given).expanduser()
