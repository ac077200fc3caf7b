"""What waits for W&B's server, done by a thread: tables and artifacts, for as long as they take to arrive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import wandb

Action = Callable[["wandb.Run"], object]


class Job(NamedTuple):
    """Something to do with a run."""

    what: str  # it is, for the warning where it fails
    action: Action


class NotDone(NamedTuple):
    """A job that has failed, or that nobody came to."""

    job: Job
    reason: str


class Jobs:
    """Done one after the other, in the order of the calls; each returns when W&B has it, or raises.

    Where the server is gone the one that waits for it keeps the others waiting, up to the end.

    Args:
        run: the run as it is when a job's turn has come; None where there is none any more.
    """

    def __init__(self, run: Callable[[], wandb.Run | None]) -> None:
        self._run = run
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._doing: Job | None = None
        self._failed: list[NotDone] = []
        threading.Thread(target=self._work, name="wandb jobs", daemon=True).start()

    def add(self, job: Job) -> None:
        self._waiting.put(job)

    def _work(self) -> None:
        while True:
            self._doing = None
            self._doing = job = self._waiting.get()
            run = self._run()
            if run is not None:
                try:
                    job.action(run)
                except Exception as error:  # whatever wandb raises, the next job has its turn
                    self._failed.append(NotDone(job, in_short(error)))

    def finish(self, seconds: float) -> list[NotDone]:
        """Does all, once more what has failed; returns what could not be done within these seconds."""
        failed, self._failed = self._failed, []
        for job, _ in failed:
            self.add(job)
        are_done = threading.Event()
        self.add(Job("", lambda run: are_done.set()))
        if are_done.wait(seconds):
            return self._failed
        late = [self._doing] if self._doing is not None else []
        while not self._waiting.empty():
            late.append(self._waiting.get())
        return [*self._failed, *(NotDone(job, "W&B did not answer in time") for job in late if job.what)]


def in_short(error: BaseException) -> str:
    """What it is, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
