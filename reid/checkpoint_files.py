"""Checkpoint files: whole or absent, verified when read, written while training goes on."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reid.errors import TakenOverError, WorldError


def checkpoints_in(folder: Path, kind: str) -> list[Path]:
    """The checkpoints that are called last or best, the oldest first."""
    return sorted(folder.glob(f"{kind}_*.pt"), key=_age)


def _age(file: Path) -> tuple[int, str]:
    """Orders checkpoints by epoch, whatever number of digits it has, then by name."""
    number = file.stem.split("_")[1]
    return (int(number) if number.isdecimal() else -1, file.name)


def host_copy(content: Any, used: Any = None) -> Any:
    """The same values with every tensor copied into host memory, where training cannot change it any more.

    Args:
        content: nested dicts, lists and tuples.
        used: an earlier copy that nobody needs any more. Its memory is taken where it fits, which is eight times as
            fast as getting new memory from the system.
    """
    if isinstance(content, Tensor):
        fits = isinstance(used, Tensor) and (used.shape, used.dtype) == (content.shape, content.dtype)
        # A GPU copies into pinned memory only at full speed.
        memory = used if fits else torch.empty(content.shape, dtype=content.dtype, pin_memory=content.is_cuda)
        return memory.copy_(content.detach())
    if isinstance(content, dict):
        earlier = used if isinstance(used, dict) else {}
        return {key: host_copy(value, earlier.get(key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        others = used if isinstance(used, list | tuple) and len(used) == len(content) else [None] * len(content)
        return type(content)(map(host_copy, content, others))
    return content


def save_atomically(
    file: Path, content: dict[str, Any], check: Callable[[], None] = lambda: None, *, key: str = "OUTPUT_DIR"
) -> None:
    """The whole file under that name, or what stood there before.

    torch.save writes a zip archive with a CRC-32 of every tensor, which `weights.read_file` checks.

    Args:
        file: to write.
        content: of it.
        check: raises where the file must not appear after all; called last of all.
        key: Setting or argument that names the place, for the error.

    Raises:
        WorldError: the disk is full or not writable.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        check()
        temporary.replace(file)
        _sync_folder(file.parent)
    except TakenOverError:
        raise
    except (OSError, RuntimeError) as error:
        # Whatever stops torch.save while it writes, Ctrl-C too, comes out as a RuntimeError about positions.
        reason = error if isinstance(error, OSError) else error.__context__ or error
        if not isinstance(reason, OSError):
            raise reason from None
        raise WorldError(
            f"the checkpoint {file} cannot be written: {reason.strerror}; free some space", key=key
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """So that a power failure does not take the new name away again."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync folders
            raise
    finally:
        os.close(descriptor)


class BackgroundWriter:
    """One write at a time, in a thread, while training goes on."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._begun: tuple[str, Future[None]] | None = None

    @property
    def is_busy(self) -> bool:
        return self._begun is not None and not self._begun[1].done()

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Begins the work; `wait` must have ended what was begun before."""
        assert self._begun is None
        self._begun = name, self._executor.submit(work)

    def wait(self) -> tuple[str, WorldError | None]:
        """Waits for the work that was begun, if any; returns its name and what went wrong with it."""
        if self._begun is None:
            return "", None
        (name, future), self._begun = self._begun, None
        error = future.exception()
        if error is not None and not isinstance(error, WorldError):
            raise error
        return name, error
