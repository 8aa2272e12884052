"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diversedit_jax.errors import ConfigError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place once it is written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_folder(path: str | os.PathLike, what: str = "workdir") -> Path:
    """A directory to write to, as an absolute path, made if missing; ConfigError, naming `what`, if that cannot be."""
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
