"""W&B's own process, which must not outlive the one that it works for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from reid.errors import SettingsError

# Seconds that it may go on sending when the process that it works for was killed. All is on the disk by then; without a
# server it would try for hours.
_GRACE = 10.0
_LOOK = 0.25  # seconds between two looks of the watcher


class Service:
    """W&B's own process (wandb-core) of this one: started when it is first needed, and ended.

    Beside it runs a watcher, which does nothing but end it some seconds after this process where this one was killed.
    """

    def __init__(self) -> None:
        self._process: psutil.Process | None = None
        self._watcher: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path) -> None:
        """Before anything else is asked of wandb; once more does no harm.

        Args:
            folder: of the run, for what wandb keeps in the home folder else.

        Raises:
            SettingsError: wandb refuses what stands in the environment or its settings files.
        """
        import wandb

        # Payloads would be a second copy there, and lost where only the run's folder is kept.
        os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb" / "data").absolute()))
        os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "wandb" / "cache").absolute()))
        try:
            wandb.setup(wandb.Settings(silent=True))
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise SettingsError(
                f"W&B refuses its settings in the environment or in its settings files: {reason}; correct them, or use "
                "WANDB.ENABLE no",
                key="WANDB.ENABLE",
            ) from error
        processes = services_of(os.getpid())
        if processes and processes[-1] != self._process:
            self._end_watcher()
            self._process = processes[-1]
            self._watcher = _start_watcher(self._process)

    def end(self, seconds: float = 5.0) -> None:
        """It is gone when this returns; what it has not sent is on the disk.

        Args:
            seconds: that it may take to end by itself.
        """
        # In a thread, as wandb waits for it without a limit.
        teardown = threading.Thread(target=_tear_down, name="wandb teardown", daemon=True)
        teardown.start()
        teardown.join(seconds)
        if self._process is not None:
            kill([self._process])
            teardown.join(seconds)
            self._process = None
        self._end_watcher()

    def _end_watcher(self) -> None:
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            self._watcher = None


def _tear_down() -> None:
    import wandb

    with suppress(Exception):  # of a process that is gone; wandb forgets it nevertheless
        wandb.teardown()


def services_of(pid: int) -> list[psutil.Process]:
    """W&B's own processes that this one has started and that have not ended, the oldest first."""
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if child.name() == "wandb-core" and child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    """These and no others: a process that has their number since is left alone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _start_watcher(service: psutil.Process, grace: float = _GRACE) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "reid.handlers.wandb_process", str(os.getpid()), str(service.pid), str(grace)]
    nothing = subprocess.DEVNULL
    # In a session of its own, so that Ctrl-C does not end it.
    return subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


def _watch(parent: int, service: psutil.Process, grace: float) -> None:
    while os.getppid() == parent:  # of one that has ended it changes at once, also before anybody has taken note
        if not service.is_running():
            return
        time.sleep(_LOOK)
    with suppress(psutil.TimeoutExpired):
        service.wait(grace)
    kill([service])


if __name__ == "__main__":
    with suppress(psutil.NoSuchProcess):
        _watch(int(sys.argv[1]), psutil.Process(int(sys.argv[2])), float(sys.argv[3]))
