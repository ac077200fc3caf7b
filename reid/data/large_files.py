"""Large files that appear whole or not at all, and of which a killed process leaves nothing behind for long."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".partial"
_PIECE = 1 << 24  # bytes that are copied at a time


@contextmanager
def new_file(file: Path, num_bytes: int) -> Iterator[int]:
    """A descriptor to `num_bytes` of reserved disk, which become `file` at the end, or nothing after an error.

    What killed processes have left behind in the folder is removed first.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(file.parent)
    partial = copy_of(file, file.parent, uuid.uuid4().hex)
    descriptor = _create_locked(partial)
    try:
        _reserve(descriptor, num_bytes)
        yield descriptor
        os.fsync(descriptor)  # or a power failure after the rename leaves a file of the right length full of zeros
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def copy_of(file: Path, folder: Path, token: str) -> Path:
    """What a copy of the file is called in a folder, for those who know the token."""
    return folder / f"{file.name}.{token}{_SUFFIX}"


@contextmanager
def copied(file: Path, copy: Path) -> Iterator[None]:
    """The file under another name as well, for as long as the context lasts; who has opened the copy keeps it.

    Args:
        file: to copy.
        copy: as `copy_of` names it. What killed processes have left behind in its folder is removed first.

    Raises:
        OSError: there is no room, the folder cannot be written to, or the copy is not what was read.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(copy.parent)
    descriptor = _create_locked(copy)
    try:
        _copy_and_compare(file, descriptor)
        yield
    finally:
        copy.unlink(missing_ok=True)
        os.close(descriptor)


def _copy_and_compare(file: Path, descriptor: int) -> None:
    with file.open("rb", buffering=0) as source:
        num_bytes = os.fstat(source.fileno()).st_size
        _reserve(descriptor, num_bytes)
        read = place = 0
        while piece := source.read(_PIECE):
            read = zlib.crc32(piece, read)
            write_at(descriptor, piece, place)
            place += len(piece)
    written = 0
    for start in range(0, place, _PIECE):
        written = zlib.crc32(os.pread(descriptor, _PIECE, start), written)
    if place != num_bytes or written != read:
        raise OSError(errno.EIO, "the copy is not what was read")


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write through the file, not through a map: on a full disk this raises, where a map kills with SIGBUS."""
    remaining = memoryview(content)
    while remaining:
        written = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[written:], offset + written


def _create_locked(partial: Path) -> int:
    """A new file, locked for as long as this process lives and has it open."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            return descriptor  # a file system without locks: nobody can lock it to remove it either
        if partial.exists():
            return descriptor
        os.close(descriptor)  # another process saw it before it was locked and took it for abandoned


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files of processes that were killed: those that no living process has locked."""
    for partial in folder.glob(f"*.npy.*{_SUFFIX}"):
        try:
            descriptor = os.open(partial, os.O_RDWR)
        except OSError:
            continue  # gone by now, or another user's
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
        except OSError:
            continue  # its process is alive
        finally:
            os.close(descriptor)


def _reserve(descriptor: int, num_bytes: int) -> None:
    status = os.fstatvfs(descriptor)
    # Some network file systems reserve by writing, which takes minutes to fail; and some do not know their size.
    if status.f_blocks and status.f_bavail * status.f_frsize < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(descriptor, 0, num_bytes)
