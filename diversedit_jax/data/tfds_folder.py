"""A tfds data set in array_record files, opened without TensorFlow and without its own Python code."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from diversedit_jax.data import MAX_CLASSES
from diversedit_jax.reading import check_folder, read_json

RAW = tfds.decode.DeserializeMethod.RAW_BYTES
FEATURES = "features.json"
KINDS = ("type", "pythonClassName", "python_class_name")  # keys of FEATURES that name a class
ROOT = "tensorflow_datasets.core.features."


def first_line(error: Exception) -> str:
    """The type of an error and the begin of its message. Some errors of array_record have no message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def open_folder(path: Path) -> Any:
    """The builder of the data set in a folder: its metadata, and the way to its records.

    Any Exception says that there is none. ValueError for a class that is not of tfds: tfds would import its module.
    """
    check_folder(path)
    if (path / FEATURES).exists():
        for key, value in _strings(read_json(path / FEATURES)):
            if key in KINDS and not value.startswith(ROOT):
                raise ValueError(f"{FEATURES} asks for {value!r:.100}: only the features of tfds are read")
    builder = tfds.builder_from_directory(str(path))
    for name, feature in builder.info.features.items():
        if (getattr(feature, "num_classes", None) or 0) > MAX_CLASSES:
            raise ValueError(f"feature {name!r} has {feature.num_classes} classes: wanted at most {MAX_CLASSES}")
    return builder


def _strings(tree: Any) -> Iterator[tuple[str, str]]:
    """All strings in a JSON value, each with its key."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, str):
            yield str(key), value
        elif isinstance(value, dict | list):
            yield from _strings(value)


def records_of(builder: Any, split: str) -> Any:
    """The records of a split by index, as stored. Any Exception says that they cannot be opened."""
    return builder.as_data_source(split, deserialize_method=RAW) if builder.info.splits[split].num_examples else []


def parsed(record: bytes) -> Mapping[str, Any]:
    """The features of a record, as stored."""
    return tf_example_pb2.Example.FromString(record).features.feature
