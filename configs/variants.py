"""The words after the colon of `configs/repa.py:xl2,512,diversedit`: a size, a resolution and what is added."""

from typing import NamedTuple

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import one_of

SIZES = {"b2": "B", "l2": "L", "xl2": "XL"}  # -> config.model.size
RESOLUTIONS = ("256", "512")


class Variant(NamedTuple):
    """What the words of a variant say."""

    size: str  # a key of SIZES
    resolution: str  # of the images, in pixels
    added: tuple[str, ...]  # the other words


def read(words: str, *addable: str, sizes: tuple[str, ...] = tuple(SIZES)) -> Variant:
    """Read words such as `xl2,512,diversedit`, in any order; the first size and 256 pixels are the defaults.

    addable: the other words that the recipe knows. Raises ConfigError for an unknown word and for two of one kind.
    """
    given = [one_of("variant", word, (*sizes, *RESOLUTIONS, *addable)) for word in words.split(",") if word]

    def only(kind: tuple[str, ...]) -> str:
        found = [word for word in given if word in kind] or [kind[0]]
        if len(found) > 1:
            raise ConfigError(f"variant {words!r}: give one of {', '.join(found)}")
        return found[0]

    return Variant(only(sizes), only(RESOLUTIONS), tuple(word for word in given if word in addable))
