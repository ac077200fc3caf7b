"""The files of a run: settings, environment, log, metrics, result; written by rank 0."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reid import distributed
from reid.config import dump
from reid.errors import WorldError

if TYPE_CHECKING:
    from yacs.config import CfgNode

_PACKAGES = ("torch", "torchvision", "pytorch-ignite", "accelerate", "wandb", "numpy", "pillow")


class RunDirectory:
    """OUTPUT_DIR and what stands in it. All ranks may hold one; only rank 0 writes.

    Args:
        path: of the folder, created with its parents.

    Raises:
        WorldError: it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        distributed.together(self._create)

    def _create(self) -> None:
        if not distributed.is_main():
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "log.txt").touch()
        except OSError as error:
            raise WorldError(
                f"OUTPUT_DIR={self.path} cannot be written to: {error}; choose another OUTPUT_DIR"
            ) from error
        self._log = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("reid").addHandler(self._log)

    def claim(self) -> None:
        """Keeps other trainings out for as long as this process lives, and tidies up; called by all ranks.

        Raises:
            WorldError: another one is at work here.
        """
        distributed.together(self._lock)

    def _lock(self) -> None:
        if not distributed.is_main():
            return
        assert self._log.stream is not None
        try:
            # Of this process alone: a loader process that outlives it for a moment does not hold it.
            fcntl.lockf(self._log.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # a file system without locks
            raise WorldError(
                f"OUTPUT_DIR={self.path} is in use by another training; wait for its end, or choose another OUTPUT_DIR"
            ) from error
        for unfinished in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            unfinished.unlink(missing_ok=True)  # of a process that was killed while it wrote

    def describe(self, cfg: CfgNode, device: torch.device) -> None:
        """Writes config.yaml and environment.json; called by all ranks."""
        own = {"rank": distributed.rank(), "host": platform.node(), "device": _device_name(device)}
        ranks = distributed.gather_objects(own)
        if distributed.is_main():
            environment = {
                "commit": commit(),
                "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
                "world_size": distributed.num_ranks(),
                "ranks": ranks,
            }
            write_atomically(self.path / "config.yaml", dump(cfg))
            write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        with _disk_errors(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def drop_metrics_after(self, iteration: int) -> None:
        """Takes out the records of steps behind the checkpoint that training goes on from: they will come again."""
        if not distributed.is_main() or not self._metrics.exists():
            return
        lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
        write_atomically(self._metrics, "".join(kept))

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """The whole text under that name, or what stood there before.

    Raises:
        WorldError: the disk is full or not writable.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _disk_errors(file):
        try:
            with temporary.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _disk_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorldError(
            f"{file} cannot be written: {error.strerror or error}; free some space and start again"
        ) from error


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the source tree that this package runs from, with "+" where changed; else "unknown"."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
