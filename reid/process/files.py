"""Files that are either complete or absent, even if the process that writes them is killed.

Large files are locked while they are written. The lock, unlike one of `filelock`, is on the temporary file itself: it
ends with the process, needs no second file, and shows the next process which files are abandoned.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reid.errors import WorldError

_SUFFIX = ".partial"
_CHUNK = 1 << 24  # bytes copied at a time


def printable(text: object) -> str:
    """Return the text with escapes for invalid Unicode; the name of a file may hold any bytes."""
    return str(text).encode("utf-8", "backslashreplace").decode()


@contextmanager
def disk_errors(path: Path | str, *, key: str) -> Iterator[None]:
    """Translate an OSError into an error that names the path.

    Args:
        path: File or folder that is being written.
        key: Setting or option that names it.

    Raises:
        WorldError: The disk is full or not writable.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise WorldError(
            f"{path} cannot be written: {reason}. Fix: free some space or choose another folder.", key=key
        ) from error


@contextmanager
def atomic_write(file: Path, *, key: str, verify: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `file` at the end or removed after an error.

    Example:
        with atomic_write(Path("a.png"), key="--output") as temporary:
            image.save(temporary)

    Args:
        file: Path of the file to write. The temporary path has the same suffix.
        key: Setting or option that names the file, for the error.
        verify: Function called right before the rename. If it raises, the file is not created.

    Raises:
        WorldError: The disk is full or not writable.
    """
    temporary = file.with_name(f".{file.stem}.{secrets.token_hex(4)}.tmp{file.suffix}")
    with disk_errors(file, key=key), _renamed(temporary, file, verify):
        yield temporary


def write_text(file: Path, text: str, *, key: str) -> None:
    """Write a text file atomically, in UTF-8; `key` and the errors are those of `atomic_write`."""
    with atomic_write(file, key=key) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _renamed(temporary: Path, file: Path, verify: Callable[[], None] = lambda: None) -> Iterator[None]:
    try:
        yield
        _sync(temporary)  # without it, a power failure after the rename leaves a file full of zeros
        verify()
        temporary.replace(file)
        _sync(file.parent)  # without it, a power failure takes the new name away
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync folders
            raise
    finally:
        os.close(descriptor)


# ---- large files, with reserved space ----


@contextmanager
def reserved_file(file: Path, num_bytes: int) -> Iterator[int]:
    """Yield a descriptor to `num_bytes` of reserved disk, which become `file` at the end, or nothing after an error.

    Temporary files that killed processes left in the folder are removed first.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(file.parent)
    partial = copy_path(file, file.parent, secrets.token_hex(16))
    descriptor = _create_locked(partial)
    try:
        with _renamed(partial, file):
            _reserve(descriptor, num_bytes)
            yield descriptor
    finally:
        os.close(descriptor)


def copy_path(file: Path, folder: Path, token: str) -> Path:
    """Return the path of the copy that the owner of the token makes of the file in a folder."""
    return folder / f"{file.name}.{token}{_SUFFIX}"


@contextmanager
def temporary_copy(file: Path, copy: Path) -> Iterator[None]:
    """Keep a copy of a file for as long as the context lasts; a process that has opened the copy can still read it.

    Args:
        file: File to copy.
        copy: Path that `copy_path` returned. Copies of killed processes are removed from its folder first.

    Raises:
        OSError: There is no room, the folder cannot be written to, or the copy differs from the file.
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


def write_at(descriptor: int, content: bytes, offset: int) -> None:
    """Write through the descriptor: a full disk raises here, where writing to a memory map kills with SIGBUS."""
    remaining = memoryview(content)
    while remaining:
        written = os.pwrite(descriptor, remaining, offset)
        remaining, offset = remaining[written:], offset + written


def _copy_and_compare(file: Path, descriptor: int) -> None:
    with file.open("rb", buffering=0) as source:
        num_bytes = os.fstat(source.fileno()).st_size
        _reserve(descriptor, num_bytes)
        crc_read = size = 0
        while chunk := source.read(_CHUNK):
            crc_read = zlib.crc32(chunk, crc_read)
            write_at(descriptor, chunk, size)
            size += len(chunk)
    crc_written = 0
    for start in range(0, size, _CHUNK):
        crc_written = zlib.crc32(os.pread(descriptor, _CHUNK, start), crc_written)
    if size != num_bytes or crc_written != crc_read:
        raise OSError(errno.EIO, "the copy differs from the file")


def _create_locked(partial: Path) -> int:
    """Create a file that is locked until this process ends or closes it."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            return descriptor  # a file system without locks: no process can lock it to remove it either
        if partial.exists():
            return descriptor
        os.close(descriptor)  # another process saw it before it was locked and removed it as abandoned


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files that no living process has locked."""
    for partial in folder.glob(f"*.npy.*{_SUFFIX}"):
        try:
            descriptor = os.open(partial, os.O_RDWR)
        except OSError:
            continue  # removed meanwhile, or another user's
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
