"""The files of a run: settings, environment, log, metrics, result; written by rank 0."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import platform
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from reid import distributed
from reid.config import dump
from reid.errors import UnsavedError, WorldError
from reid.logs import LogFile
from reid.preemption import MARKER, write_marker

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger("reid.run")

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
        self.checkpoints, self.pictures = path / "checkpoints", path / "pictures"
        self._metrics = path / "metrics.jsonl"
        self._unwritten: list[str] = []  # records that found the disk full
        self._unwritten_result: str | None = None
        distributed.together(self._create)

    def _create(self) -> None:
        if not distributed.is_main():
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "log.txt").touch()
        except OSError as error:
            raise WorldError(
                f"OUTPUT_DIR={self.path} cannot be written to: {error}; choose another OUTPUT_DIR", key="OUTPUT_DIR"
            ) from error
        self._log = LogFile(self.path / "log.txt")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("reid").addHandler(self._log)

    def lock(self) -> bool:
        """Keeps other trainings out for as long as this process lives; for rank 0. False: another one is in here."""
        assert self._log.stream is not None
        try:
            # Of this process alone: a child process that outlives it for a moment does not hold it.
            fcntl.lockf(self._log.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)  # else a file system without locks
        return True

    def tidy(self) -> None:
        """Removes what a killed process was writing; for rank 0."""
        for unfinished in chain(*(folder.glob(".*.tmp") for folder in (self.path, self.checkpoints, self.pictures))):
            unfinished.unlink(missing_ok=True)

    def describe(self, cfg: CfgNode, device: torch.device) -> None:
        """Writes config.yaml and environment.json; called by all ranks."""
        own = {"rank": distributed.rank(), "host": platform.node(), "device": _device_name(device)}
        ranks = distributed.gather_objects(own)
        if distributed.is_main():
            environment = environment_facts() | {"ranks": ranks}
            write_atomically(self.path / "config.yaml", dump(cfg))
            write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """One more line of metrics.jsonl; where the disk is full, training goes on and the line is kept for later."""
        self._unwritten.append(json.dumps(record) + "\n")
        try:
            self._append_unwritten()
        except OSError as error:
            if len(self._unwritten) == 1:
                words = _cannot_write(self._metrics, error)
                logger.warning("warning: %s; training goes on, and its lines are kept for later", words)

    def _append_unwritten(self) -> None:
        lines = "".join(self._unwritten).encode()
        with self._metrics.open("ab", buffering=0) as file:
            whole = file.tell()
            if file.write(lines) < len(lines):
                file.truncate(whole)  # no half line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten.clear()

    def go_on_from(self, iteration: int, last_validation: int) -> None:
        """Takes out the records that come again, and the marker of a preemption; called by all ranks.

        Args:
            iteration: of the checkpoint that training goes on from.
            last_validation: iteration of the last validation that the checkpoint knows of; 0: none.
        """
        last = {"train": iteration, "val": last_validation}

        def tidy() -> None:
            if not distributed.is_main():
                return
            (self.path / MARKER).unlink(missing_ok=True)
            if self._metrics.exists():
                lines = self._metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                places = [_place(line) for line in lines]
                if None in places[:-1]:  # the last line may have been cut off with the process
                    logger.warning("warning: %s had lines that are no records; they are left out", self._metrics)
                kept = [line for line, place in zip(lines, places, strict=True) if place and place[1] <= last[place[0]]]
                write_atomically(self._metrics, "".join(kept))

        distributed.together(tidy)

    def write_result(self, result: dict[str, Any]) -> None:
        """result.json; where the disk is full, training goes on and `finish` tries again."""
        self._unwritten_result = json.dumps(result, indent=2) + "\n"
        try:
            self._write_result()
        except WorldError as error:
            logger.warning("warning: %s; training goes on", error)

    def write_rows(self, name: str, rows: Sequence[NamedTuple]) -> None:
        """The rows as a CSV file, under their fields' names; called by all ranks.

        Args:
            name: of the file.
            rows: at least one, all of one kind.

        Raises:
            WorldError: the disk is full or not writable.
        """

        def write() -> None:
            if not distributed.is_main():
                return
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([rows[0]._fields, *rows])
            write_atomically(self.path / name, text.getvalue())

        distributed.together(write)

    def _write_result(self) -> None:
        if self._unwritten_result is not None:
            write_atomically(self.path / "result.json", self._unwritten_result)
            self._unwritten_result = None

    def finish(self) -> None:
        """Writes what found the disk full; called by all ranks.

        Raises:
            UnsavedError: it still is.
        """

        def write() -> None:
            try:
                self._write_result()
                with _disk_errors(self._metrics):
                    self._append_unwritten()
            except WorldError as error:
                raise UnsavedError(str(error), key=error.key) from error

        distributed.together(write)

    def leave_marker(self, words: str) -> None:
        """Says that the run was stopped by a signal and is to be started again; called by all ranks."""
        if distributed.is_main():
            write_marker(self.path, words)
        logger.info("stopped by a signal: %s; start the same command again to go on", words)


def _place(line: str) -> tuple[str, int] | None:
    """Kind and iteration of a record; None for a line that is none."""
    try:
        record = json.loads(line)
        place = str(record["kind"]), int(record["iteration"])
    except (ValueError, KeyError, TypeError):
        return None
    return place if line.endswith("\n") and place[0] in ("train", "val") else None


def write_atomically(file: Path, text: str) -> None:
    """The whole text under that name, or what stood there before.

    Raises:
        WorldError: the disk is full or not writable.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
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
        raise WorldError(f"{_cannot_write(file, error)}; free some space and start again", key="OUTPUT_DIR") from error


def _cannot_write(file: Path, error: OSError) -> str:
    return f"{file} cannot be written: {error.strerror or error}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def environment_facts() -> dict[str, Any]:
    """What a run depends on besides its settings."""
    return {
        "commit": commit(),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "world_size": distributed.num_ranks(),
    }


def source_fingerprint() -> str:
    """Of this package's source files, which a commit does not tell where they were changed or copied."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


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
