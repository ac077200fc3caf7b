"""The right to write into a run directory: a lock, and an owner file against a superseded start that is still alive."""

from __future__ import annotations

import json
import logging
import platform
import secrets
from dataclasses import asdict
from typing import Any

from ignite.engine import Engine

from reid.distributed import collectives
from reid.distributed.launch_environment import Start
from reid.errors import TakenOverError, WorldError
from reid.process.files import write_text
from reid.runs.directory import RunDirectory
from reid.runs.progress import Records

logger = logging.getLogger(__name__)

_FILE = "owner.json"


class Ownership:
    """The claim of one start of a training on its run directory. All ranks hold one; only rank 0 acts.

    A lock excludes other trainings as long as this process lives. But a machine that was cut off keeps its lock, and
    when it comes back, its ranks would write into what another machine has continued. So a start that is known to
    replace the previous one takes the directory over: it writes its token into the owner file. A start that reads
    another token ends before it writes.

    Args:
        folder: Directory of the run; temporary files of killed processes are removed from it.
        start: Number of this start within its job.

    Raises:
        TakenOverError: A later start of the same job was here.
        WorldError: Another training uses the directory.
    """

    def __init__(self, folder: RunDirectory, start: Start) -> None:
        self._folder, self._start = folder, start
        self._file, self._token = folder.path / _FILE, secrets.token_hex(8)
        self._has_lock = False
        with collectives.errors_shared():
            if collectives.is_main():
                self._claim()

    def _claim(self) -> None:
        self._has_lock = self._folder.lock()
        owner = self._read()
        former = Start(**owner["start"]) if owner else Start()
        if self._start.precedes(former):
            raise self._taken_over(owner)
        if not self._has_lock:
            if not self._start.replaces(former):
                raise WorldError(
                    f"OUTPUT_DIR must be free, got {self._folder.path}, which is in use by another training. Fix: wait "
                    "for its end, or choose another OUTPUT_DIR.",
                    key="OUTPUT_DIR",
                )
            logger.warning(
                f"warning: OUTPUT_DIR={self._folder.path} is taken over from the previous start, which is still alive "
                f"on {owner['host']}"
            )
        content = {"start": asdict(self._start), "host": platform.node(), "token": self._token}
        write_text(self._file, json.dumps(content) + "\n", key="OUTPUT_DIR")
        self._folder.tidy()

    def attach(self, trainer: Engine) -> None:
        """End a training that was superseded; attach it before all handlers that write."""
        for event in Records:
            trainer.add_event_handler(event, self.check)

    def check(self) -> None:
        """Check on rank 0 that no other start owns the directory; called before anything is written.

        Raises:
            TakenOverError: Another start owns the directory now.
        """
        if not collectives.is_main():
            return
        owner = self._read()
        if owner and owner["token"] != self._token:
            raise self._taken_over(owner)
        if not self._has_lock:  # the previous start still held it
            self._has_lock = self._folder.lock()

    def _read(self) -> dict[str, Any]:
        """Return the content of the owner file; empty without one, or if it has another format."""
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            return {"start": asdict(Start(**content["start"])), "host": str(content["host"]), "token": content["token"]}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def _taken_over(self, owner: dict[str, Any]) -> TakenOverError:
        start = Start(**owner["start"])
        successor = f"restart {start.restart} of job {start.job}" if start.job else "another training"
        return TakenOverError(
            f"OUTPUT_DIR={self._folder.path} was taken over by {successor}, on {owner['host']}; this one, on "
            f"{platform.node()}, writes no more and ends",
            key="OUTPUT_DIR",
        )
