"""Queue of upload tasks: tables and artifacts, whose calls in wandb block until the server has answered."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reid.process.side_effects import error_summary

if TYPE_CHECKING:
    import wandb

Action = Callable[["wandb.Run"], object]


@dataclass(eq=False)
class UploadTask:
    """An action on a W&B run that waits for the server.

    Attributes:
        what: Description for the warning if the task fails.
        action: Function to call; it raises if the server has not taken everything.
        error: Reason why the task is not done yet.
    """

    what: str
    action: Action
    error: str = "W&B did not answer in time"


class UploadQueue:
    """A thread that works through upload tasks in the order of the calls.

    Needed by every row of the outage table from "before the first artifact" on: run.log of a table and
    run.log_artifact block for 19 s and raise without a server. A blocked task blocks the tasks after it.

    Args:
        run: Function that returns the current run; None when it has ended.
    """

    def __init__(self, run: Callable[[], wandb.Run | None]) -> None:
        self._run = run
        self._queue: queue.SimpleQueue[UploadTask] = queue.SimpleQueue()
        self._unfinished: list[UploadTask] = []
        threading.Thread(target=self._work, name="wandb uploads", daemon=True).start()

    def add(self, task: UploadTask) -> None:
        self._unfinished.append(task)
        self._queue.put(task)

    def _work(self) -> None:
        while True:
            task = self._queue.get()
            run = self._run()
            if run is None:
                continue
            try:
                task.action(run)
                self._unfinished.remove(task)
            except Exception as error:  # any library below wandb; `finish` returns the task
                task.error = error_summary(error)

    def finish(self, seconds: float) -> list[UploadTask]:
        """Wait for all tasks, after one more try of those that failed; return those not done within `seconds`."""
        is_empty = threading.Event()
        for task in list(self._unfinished):
            if task.error != UploadTask.error:
                self._queue.put(task)
        last = UploadTask("", lambda run: is_empty.set())
        self.add(last)
        is_empty.wait(seconds)
        return [task for task in self._unfinished if task is not last]
