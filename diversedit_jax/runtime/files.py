"""Files that are written whole or not at all, and folders in which a restarted program continues its work."""

import contextlib
import csv
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diversedit_jax.errors import ConfigError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. At the end its content is on the disk, and replaces that of `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Write a JSON file, whole or not at all. options: for json.dumps."""
    write_text(path, json.dumps(content, indent=2, **options) + "\n")


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    with replacing(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file, whole or not at all."""
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted name: value}; tuples become lists, as in JSON."""
    leaves = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = list(value) if isinstance(value, tuple) else value
    return leaves


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted names at which two trees differ, each with both values; None for a missing one."""
    old, new = flat(before), flat(now)
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def check_same(
    what: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    remedy: str,
    allowed: Callable[[str, Any, Any], bool] = lambda key, old, new: False,
) -> None:
    """Raise ConfigError, which names every difference, if the settings of work in a folder are not those of now.

    what: the work, such as `DIR holds an evaluation`. remedy: what the user can do. allowed: whether (key, old, new) is
    no mistake.
    """
    found = differences(before, json.loads(json.dumps(now)))
    if changed := {key: pair for key, pair in found.items() if not allowed(key, *pair)}:
        said = "; ".join(f"{key}: {old!r:.80} there, {new!r:.80} given" for key, (old, new) in changed.items())
        raise ConfigError(f"{what} with other settings ({said}): {remedy}")


def writable_folder(path: str | os.PathLike, what: str = "workdir") -> Path:
    """A directory to write to, as an absolute path. It is made if missing; ConfigError if it cannot be written."""
    if "://" in str(path):
        raise ConfigError(f"{what} {path} is a URL: mount the bucket as a directory (gcsfuse) and give its path")
    workdir = Path(path).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=workdir, prefix=".write-test-") as file:
            file.write(b"test")
    except OSError as error:
        reason = "it is a file" if workdir.is_file() else error.strerror or error
        raise ConfigError(f"{what} {workdir} cannot be written: {reason}") from None
    return workdir
