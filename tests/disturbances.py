"""Disturbances at an exact point of a training, made by the training process itself.

A test that waits for a line and then acts would race with the training on a busy machine. Each function here runs
before the program starts (argument `before` of `Place.start`); an action is any picklable function.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Collection
from concurrent.futures import wait
from itertools import count
from pathlib import Path

from program import wait_for_file

Action = Callable[[], object]


def at_step(number: int, action: Action, ranks: Collection[int] | None = None) -> None:
    """Act within the step of this number, counted from 1 in each start; on all ranks by default."""
    from reid.training.criterion import Criterion

    _at_call(Criterion, "__call__", number, action, ranks)


def in_evaluation(action: Action, ranks: Collection[int] | None = None) -> None:
    """Act when the first batch of the first evaluation is embedded."""
    from reid.evaluation.evaluator import Evaluator

    _at_call(Evaluator, "_collect", 1, action, ranks)


def before_model(action: Action) -> None:
    """Act after the data is opened and before the model is built."""
    from reid.training import build

    _at_call(build, "build_model", 1, action, None)


def write_at_once() -> None:
    """Write each checkpoint before the next step, so that a timed checkpoint is never skipped."""
    from reid.checkpoints.save import BackgroundWriter

    original = BackgroundWriter.start

    def start(self, name, work):
        original(self, name, work)
        wait([self._started[1]])

    BackgroundWriter.start = start  # type: ignore[method-assign]


def _at_call(owner: object, name: str, number: int, action: Action, ranks: Collection[int] | None) -> None:
    original, calls = getattr(owner, name), count(1)

    def disturbed(*arguments, **options):
        if next(calls) == number and (ranks is None or int(os.environ.get("RANK", "0")) in ranks):
            action()
        return original(*arguments, **options)

    setattr(owner, name, disturbed)


# ---- actions ----


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def signal_self_twice(number: int, file: str) -> None:
    """Signal twice when the file exists; the second signal comes when the first one has been handled."""
    wait_for_file(file)
    signal_self(number)
    os.write(1, b"signalled once\n")
    signal_self(number)


def kill_self_when(file: str) -> None:
    """Send SIGKILL as soon as a file of this pattern exists."""
    wait_for_file(file)
    signal_self(signal.SIGKILL)


def hang() -> None:
    """Wait forever."""
    while True:
        time.sleep(0.1)


def fill_disk(file: str, first: str) -> None:
    """Fill the file system of `file` to the last byte when the file `first` exists."""
    wait_for_file(first)
    with Path(file).open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)):
                pass
        except OSError:
            return


# ---- limits ----


def small_files_only() -> None:
    """Limit every file to 1 MB, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
