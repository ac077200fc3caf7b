"""Checkpoint files: complete or absent, verified when read, written in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reid.errors import WorldError
from reid.process.files import atomic_write


def checkpoints_in(folder: Path, kind: str) -> list[Path]:
    """Return the checkpoints of a kind, last or best, the oldest first."""
    return sorted(folder.glob(f"{kind}_*.pt"), key=_age)


def _age(file: Path) -> tuple[int, str]:
    """Return a sort key: the epoch, whatever number of digits it has, then the name."""
    number = file.stem.split("_")[1]
    return (int(number) if number.isdecimal() else -1, file.name)


def host_copy(content: Any, used: Any = None) -> Any:
    """Return the content with every tensor copied into host memory, where training cannot change it any more.

    Args:
        content: Nested dicts, lists and tuples.
        used: Earlier copy that is no longer needed. Its memory is reused where it fits, which is eight times as fast
            as allocating.
    """
    if isinstance(content, Tensor):
        fits = isinstance(used, Tensor) and (used.shape, used.dtype) == (content.shape, content.dtype)
        # A GPU copies at full speed only into pinned memory.
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
    file: Path, content: dict[str, Any], verify: Callable[[], None] = lambda: None, *, key: str = "OUTPUT_DIR"
) -> None:
    """Save the content with torch.save; the file is complete, or what it was before.

    torch.save writes a zip archive with a CRC-32 of every tensor, which `weights.read_file` verifies.

    Args:
        file: Path of the checkpoint.
        content: Content of the checkpoint.
        verify: Function called right before the file is replaced. If it raises, the file stays as it was.
        key: Setting or argument that names the file, for the error.

    Raises:
        WorldError: The disk is full or not writable.
    """
    with atomic_write(file, key=key, verify=verify) as temporary:
        try:
            with temporary.open("wb") as stream:
                torch.save(content, stream)
        except RuntimeError as error:
            # Whatever stops torch.save while it writes, Ctrl-C too, becomes a RuntimeError about positions.
            raise error.__context__ or error from None


class BackgroundWriter:
    """A thread that writes one file at a time while training continues."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._started: tuple[str, Future[None]] | None = None

    @property
    def is_busy(self) -> bool:
        return self._started is not None and not self._started[1].done()

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Start the work; `wait` must have been called for the work before it."""
        assert self._started is None
        self._started = name, self._executor.submit(work)

    def wait(self) -> tuple[str, WorldError | None]:
        """Wait for the started work, if any; return its name and its error."""
        if self._started is None:
            return "", None
        (name, future), self._started = self._started, None
        error = future.exception()
        if error is not None and not isinstance(error, WorldError):
            raise error
        return name, error
