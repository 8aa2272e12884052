"""File formats of weights. Each is read as data: nothing in a file is run."""

from collections.abc import Iterator, Mapping


class NamedArrays(Mapping):
    """The arrays of an open file by name, each read when it is asked for.

    shapes: the shape of every array, known without reading any.
    foreign: objects beside the arrays that are not read: path -> the name of what makes it.
    about: strings beside the arrays.
    """

    shapes: Mapping[str, tuple[int, ...]]
    foreign: Mapping[str, str] = {}
    about: Mapping[str, str] = {}

    def names(self, prefix: str = "") -> list[str]:
        """Names at and below a path of the saved object, in its order: `ema` -> `ema.pos_embed`, ..."""
        return [name for name in self.shapes if not prefix or name == prefix or name.startswith(f"{prefix}.")]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file, where one stays open between two arrays."""
