"""Who may write into a run's folder: a lock, and a fence against a start that was given up but is still alive."""

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


def claim(folder: RunDirectory, start: Start) -> Ownership:
    """Keeps other trainings out for as long as this process lives, and tidies up; called by all ranks.

    Args:
        folder: of the run.
        start: which start of which job this is.

    Raises:
        TakenOverError: a later start of the same job was here.
        WorldError: another training is at work here.
    """
    ownership = Ownership(folder, start)
    with collectives.errors_shared():
        if collectives.is_main():
            ownership.claim()
    return ownership


class Ownership:
    """Of one start of a training over its folder. All ranks may hold one; only rank 0 acts.

    A lock keeps other trainings out. But a machine that was cut off keeps its lock, and when it comes back its ranks
    would write into what another machine has gone on with. So a start that is known to replace the one before takes
    the folder over: it leaves a token of its own, and a start that finds another's ends before it writes.

    Args:
        folder: of the run.
        start: which start of which job this is.
    """

    def __init__(self, folder: RunDirectory, start: Start) -> None:
        self._folder, self._start = folder, start
        self._file, self._token = folder.path / _FILE, secrets.token_hex(8)
        self._has_lock = False

    def claim(self) -> None:
        """For rank 0; see the function `claim`."""
        self._has_lock = self._folder.lock()
        owner = self._read()
        former = Start(**owner["start"]) if owner else Start()
        if self._start.precedes(former):
            raise self._taken_over(owner)
        if not self._has_lock:
            if not self._start.replaces(former):
                raise WorldError(
                    f"OUTPUT_DIR={self._folder.path} is in use by another training; wait for its end, or choose "
                    "another OUTPUT_DIR",
                    key="OUTPUT_DIR",
                )
            logger.warning(
                "warning: OUTPUT_DIR=%s is taken over from the start before this one, on %s, which still lives",
                *(self._folder.path, owner["host"]),
            )
        content = {"start": asdict(self._start), "host": platform.node(), "token": self._token}
        write_text(self._file, json.dumps(content) + "\n", key="OUTPUT_DIR")
        self._folder.tidy()

    def attach(self, trainer: Engine) -> None:
        """Ends the training of which the folder was taken over; attach it before all that writes."""
        for event in Records:
            trainer.add_event_handler(event, self.check)

    def check(self) -> None:
        """To be called before anything is written, by rank 0 or all.

        Raises:
            TakenOverError: another start owns the folder now.
        """
        if not collectives.is_main():
            return
        owner = self._read()
        if owner and owner["token"] != self._token:
            raise self._taken_over(owner)
        if not self._has_lock:  # as the start before it still had it
            self._has_lock = self._folder.lock()

    def _read(self) -> dict[str, Any]:
        """What the owner has left; nothing where there is none, or no file of ours."""
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
            return {"start": asdict(Start(**content["start"])), "host": str(content["host"]), "token": content["token"]}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def _taken_over(self, owner: dict[str, Any]) -> TakenOverError:
        start = Start(**owner["start"])
        which = f"restart {start.restart} of job {start.job}" if start.job else "another training"
        return TakenOverError(
            f"OUTPUT_DIR={self._folder.path} was taken over by {which}, on {owner['host']}; this one, on "
            f"{platform.node()}, writes no more and ends",
            key="OUTPUT_DIR",
        )
