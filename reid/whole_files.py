"""Files that appear whole, whoever is killed while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reid.errors import WorldError


@contextmanager
def appearing(file: Path, *, key: str) -> Iterator[Path]:
    """A temporary path beside `file`, of the same suffix, that takes its name at the end, or goes after an error.

    Args:
        file: Path of the file to write.
        key: Option or setting that names the place, for the error.

    Raises:
        WorldError: the disk is full or not writable.
    """
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tmp{file.suffix}")
    with disk_errors(file, key=key):
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path, *, key: str) -> Iterator[None]:
    """Says what an error of the file system means for what is being written to `path`, which `key` names."""
    try:
        yield
    except OSError as error:
        raise WorldError(
            f"{path} cannot be written: {error.strerror or error}; free some space or choose another place",
            key=key,
        ) from error
