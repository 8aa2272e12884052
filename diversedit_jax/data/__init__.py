"""Data sets on the host: numpy, grain and tfds, never jax arrays."""

from typing import Any, NamedTuple

from diversedit_jax import slots


class Dataset(NamedTuple):
    """A finite set of examples with random access, and the random transform of one example.

    source:      examples by index: dict[str, np.ndarray], with `y` an int32 class label.
    transform:   (example, np.random.Generator) -> example; None if there is nothing to draw.
    shape:       (h, w, c) of the network's space.
    num_classes: labels are 0 .. num_classes - 1, and num_classes is the null label; 0 classes: every label is 0, which
                 is then the null label.
    """

    source: Any
    transform: Any
    shape: tuple[int, int, int]
    num_classes: int


def make(name: str, split: str, **options) -> Dataset:
    """The data set `name`, split `train` or `test`; the options are the keywords of `data.<name>.make`."""
    return slots.make("data", name, split, **options)
