"""Data sets on the host: numpy, grain and tfds, never jax arrays."""

import operator
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diversedit_jax import registry
from diversedit_jax.api import Space
from diversedit_jax.errors import ConfigError


class Dataset(NamedTuple):
    """A finite set of examples with random access, and a random transform of one example.

    source:    examples by index: dicts of numpy arrays. `y` is the condition, which may be a nested dict.
    transform: (example, np.random.Generator) -> example; None if nothing is random.
    space:     shape and conditions of an example. For stored latents: the shape of the latents.
    scale:     by which the latents must be multiplied; the codec must have the same. None: unknown.
    text:      of the tokenizer of conditions that are token ids: `sha256` of their content, number of words in its
               `vocabulary`, `length` of a text. None: conditions are something else.
    """

    source: Any
    transform: Any
    space: Space
    scale: float | None = None
    text: Mapping[str, Any] | None = None


MAX_CLASSES = 1 << 20  # far more than any data set has: a damaged label would ask for gigabytes of names and weights


def label(value: Any) -> int:
    """A label as files of others have it: a whole number, or its digits. ValueError for anything else."""
    number = int(value) if isinstance(value, str | bytes) else operator.index(value)
    if isinstance(value, bool) or not 0 <= number < MAX_CLASSES:
        raise ValueError(f"label {value!s:.40}: wanted 0 .. {MAX_CLASSES - 1}")
    return number


# make(name, split, **options): the data set `name`; options: the keywords of `data.<name>.make`.
make = partial(registry.make, "data")


def local_path(what: str, given: str | Path) -> Path:
    """A path of this machine, with `~` expanded. ConfigError, prefixed by `what`, for a bucket.

    Libraries that read buckets themselves may wait for ever. A mount fails at once.
    """
    if "://" in str(given):
        raise ConfigError(f"{what}: {given} is not a path of this machine: mount the bucket (gcsfuse) or copy it")
    return Path(given).expanduser()
