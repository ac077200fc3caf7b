"""Files of a run: settings, environment, log, metrics and result, written by rank 0."""

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
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from reid.config.load import dump
from reid.distributed import collectives
from reid.errors import UnsavedError, WorldError
from reid.process.files import disk_errors, write_text
from reid.process.logs import LogFile
from reid.process.signals import MARKER, write_marker

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).parents[1]  # the package reid
_PACKAGES = ("torch", "torchvision", "pytorch-ignite", "accelerate", "wandb", "numpy", "pillow")


class RunDirectory:
    """OUTPUT_DIR and its files. Every rank may hold one; only rank 0 writes.

    Args:
        path: Path of the folder, which is created with its parents.

    Raises:
        WorldError: The folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.pictures = path / "checkpoints", path / "pictures"
        self._metrics = path / "metrics.jsonl"
        self._unwritten: list[str] = []  # metrics.jsonl lines that a full disk did not take
        self._unwritten_result: str | None = None
        with collectives.errors_shared():
            self._create()

    def _create(self) -> None:
        if not collectives.is_main():
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "log.txt").touch()
        except OSError as error:
            raise WorldError(
                f"OUTPUT_DIR must be writable, got {self.path}: {error.strerror}. Fix: choose another OUTPUT_DIR.",
                key="OUTPUT_DIR",
            ) from error
        self._log = LogFile(self.path / "log.txt")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger("reid").addHandler(self._log)

    def lock(self) -> bool:
        """Lock the folder until this process ends, on rank 0; return False if another training holds the lock."""
        assert self._log.stream is not None
        try:
            # Not flock: a child process would inherit the lock and could hold it a moment longer.
            fcntl.lockf(self._log.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)  # other errors: a file system without locks
        return True

    def tidy(self) -> None:
        """Remove the temporary files of killed processes, on rank 0."""
        for unfinished in chain(*(folder.glob(".*.tmp*") for folder in (self.path, self.checkpoints, self.pictures))):
            unfinished.unlink(missing_ok=True)

    def describe(self, cfg: CfgNode, device: torch.device) -> None:
        """Write config.yaml and environment.json; called by all ranks."""
        local = {"rank": collectives.rank(), "host": platform.node(), "device": _device_name(device)}
        ranks = collectives.gather_objects(local)
        if collectives.is_main():
            environment = environment_facts() | {"ranks": ranks}
            self._write_text("config.yaml", dump(cfg))
            self._write_text("environment.json", json.dumps(environment, indent=2) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; if the disk is full, keep it for later."""
        self._unwritten.append(json.dumps(record) + "\n")
        try:
            self._append_unwritten()
        except OSError as error:
            if len(self._unwritten) == 1:
                reason = error.strerror or error
                logger.warning(
                    f"warning: {self._metrics} cannot be written: {reason}. Training continues and keeps its lines."
                )

    def _append_unwritten(self) -> None:
        lines = "".join(self._unwritten).encode()
        with self._metrics.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(lines) < len(lines):
                file.truncate(size)  # no half line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten.clear()

    def resume_from(self, iteration: int, last_validation: int) -> None:
        """Remove the records that will be repeated, and the preemption marker; called by all ranks.

        Args:
            iteration: Iteration of the checkpoint that training resumes from.
            last_validation: Iteration of the last validation recorded in the checkpoint; 0 for none.
        """
        with collectives.errors_shared():
            if collectives.is_main():
                (self.path / MARKER).unlink(missing_ok=True)
                if self._metrics.exists():
                    self._drop_records({"train": iteration, "val": last_validation})

    def _drop_records(self, last: dict[str, int]) -> None:
        """Remove the records after the last iteration of their kind, and lines that are no records."""
        lines = self._metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        steps = [_step(line) for line in lines]
        if None in steps[:-1]:  # a killed process may have cut off the last line
            logger.warning("warning: %s had lines that are not records; they are removed", self._metrics)
        kept = [line for line, step in zip(lines, steps, strict=True) if step and step[1] <= last[step[0]]]
        self._write_text(self._metrics.name, "".join(kept))

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json; if the disk is full, warn, and let `finish` try again."""
        self._unwritten_result = json.dumps(result, indent=2) + "\n"
        try:
            self._write_result()
        except WorldError as error:
            logger.warning("warning: %s Training continues.", error)

    def write_rows(self, name: str, rows: Sequence[NamedTuple]) -> None:
        """Write a CSV file whose columns are the fields of the rows; called by all ranks.

        Args:
            name: Name of the file.
            rows: At least one row; all of the same type.

        Raises:
            WorldError: The disk is full or not writable.
        """
        with collectives.errors_shared():
            if collectives.is_main():
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows([rows[0]._fields, *rows])
                self._write_text(name, text.getvalue())

    def _write_result(self) -> None:
        if self._unwritten_result is not None:
            self._write_text("result.json", self._unwritten_result)
            self._unwritten_result = None

    def _write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text, key="OUTPUT_DIR")

    def finish(self) -> None:
        """Write what a full disk did not take; called by all ranks.

        Raises:
            UnsavedError: The disk is still full.
        """
        with collectives.errors_shared():
            try:
                self._write_result()
                with disk_errors(self._metrics, key="OUTPUT_DIR"):
                    self._append_unwritten()
            except WorldError as error:
                raise UnsavedError(str(error), key=error.key) from error

    def leave_marker(self, outcome: str) -> None:
        """Record that a signal stopped the run and that it should be started again; called by all ranks."""
        if collectives.is_main():
            write_marker(self.path, outcome)
        logger.info("stopped by a signal: %s; start the same command again to resume", outcome)


def _step(line: str) -> tuple[str, int] | None:
    """Return kind and iteration of a record; None for a line that is no record."""
    try:
        record = json.loads(line)
        step = str(record["kind"]), int(record["iteration"])
    except (ValueError, KeyError, TypeError):
        return None
    return step if line.endswith("\n") and step[0] in ("train", "val") else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def environment_facts() -> dict[str, Any]:
    """Return what a run depends on besides its settings."""
    return {
        "commit": commit(),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "world_size": collectives.num_ranks(),
    }


def source_fingerprint() -> str:
    """Return a hash of this package's source files: a commit does not cover changed or copied files."""
    digest = hashlib.sha256()
    for file in sorted(_SOURCE.rglob("*.py")):
        digest.update(f"{file.relative_to(_SOURCE)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """Return the commit of this package's source tree, with "+" if it was changed; "unknown" without git."""
    command = ["git", "-C", str(_SOURCE), "describe"]
    command += ["--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
