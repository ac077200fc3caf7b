"""The process wandb-core, which must not outlive the training that uses it."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from reid.errors import SettingsError

# Needed by test_wandb_process_ends_with_killed_rank_0_without_server: without a server, wandb-core retries for hours
# after its parent was killed. `read` ends with this process, which holds the other end of the pipe; after 10 more
# seconds, in which wandb-core sends the rest to a server that answers, it is killed. Nothing is lost: all is on disk.
_WATCHER = 'read _; for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 1; kill -0 "$0" || exit; done; kill -9 "$0"'


class Service:
    """The wandb-core of this process, and a watcher that ends it if this process is killed."""

    def __init__(self) -> None:
        self._watcher: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path) -> None:
        """Start wandb-core unless it runs; called before anything else of wandb.

        Args:
            folder: Run directory; it receives the files that wandb would write to the home directory.

        Raises:
            SettingsError: W&B rejects its environment variables or settings files.
        """
        import wandb

        # Artifact files would be copied to the home directory, and lost where only the run directory is kept.
        os.environ.setdefault("WANDB_DATA_DIR", str((folder / "wandb" / "data").absolute()))
        os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "wandb" / "cache").absolute()))
        try:
            wandb.setup(wandb.Settings(silent=True))
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise SettingsError(
                f"W&B's environment variables and settings files must be valid, got: {reason}. Fix: correct them, or "
                "use WANDB.ENABLE no.",
                key="WANDB.ENABLE",
            ) from error
        if self._watcher is None:
            for service in services_of(os.getpid()):
                self._watcher = start_watcher(service.pid)

    def end(self, seconds: float = 5.0) -> None:
        """Tear wandb down and return when wandb-core has ended; what it has not sent is on disk.

        Args:
            seconds: Time limit for an orderly end, after which wandb-core is killed.
        """
        # wandb.teardown waits without a limit where the server is gone: every row of the outage table from "before
        # the first artifact" on.
        teardown = threading.Thread(target=_tear_down, name="wandb teardown", daemon=True)
        teardown.start()
        teardown.join(seconds)
        kill_services(os.getpid())
        teardown.join(seconds)
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.communicate()
            self._watcher = None


def _tear_down() -> None:
    import wandb

    with suppress(Exception):  # wandb-core was killed; wandb then forgets it nevertheless
        wandb.teardown()


def start_watcher(pid: int) -> subprocess.Popen[bytes]:
    """Start a process that kills process `pid` after this process was killed; in a new session because of Ctrl-C."""
    command, null = ["sh", "-c", _WATCHER, str(pid)], subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)


def services_of(pid: int) -> list[psutil.Process]:
    """Return the running wandb-core processes that a process has started."""
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if child.name() == "wandb-core" and child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def kill_services(pid: int) -> None:
    """Kill the wandb-core processes that a process has started; psutil guards against reused process ids."""
    for service in services_of(pid):
        with suppress(psutil.NoSuchProcess):
            service.kill()
