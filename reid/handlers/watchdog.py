"""Ends all ranks when one hangs, with the stack of the one that does."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from ignite.engine import Engine, Events

from reid import distributed

logger = logging.getLogger("reid.watchdog")

_EXIT_CODE = 1
_GRACE = 3.0  # seconds between the first rank that gives up and the last one that still answers
# Where a rank stands that waits for the others: in a collective, or in a backward pass with one.
_WAITING = ("torch/distributed/", "torch/autograd/", "ignite/distributed/", "torch/nn/parallel/")


class Watchdog:
    """A thread that ends the process when the main thread has given no sign of life for too long.

    All ranks give up at about the same time, as those that do not hang wait for the one that does. Each leaves word of
    where it stands, and the lowest that can speak says which one hangs.

    Args:
        minutes: without a sign of life.
    """

    def __init__(self, minutes: float) -> None:
        self._limit = 60 * minutes
        self._main = threading.main_thread()
        self._num_beats, self._last_beat = 0, time.monotonic()
        self._is_over = threading.Event()
        self._board = distributed.Noticeboard("hang", _GRACE) if distributed.num_ranks() > 1 else None

    def beat(self) -> None:
        """A sign of life."""
        self._num_beats += 1
        self._last_beat = time.monotonic()

    def attach(self, trainer: Engine) -> None:
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self.beat)
        trainer.add_event_handler(Events.ITERATION_STARTED, self.beat)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.beat)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.beat()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(min(1.0, self._limit / 10)):
            if time.monotonic() - self._last_beat > self._limit:
                self._give_up()

    def _give_up(self) -> None:
        own = _Report(distributed.rank(), platform.node(), self._num_beats, *_place(self._main))
        try:
            # In a thread, as it waits for ever where the process that keeps the board, rank 0's, is stopped.
            found = ThreadPoolExecutor(1).submit(self._gather, own).result(timeout=3 * _GRACE)
        except Exception:  # whatever has become of that process, this one must end
            found, silent = [own], [0]
        else:
            silent = sorted(set(range(distributed.num_ranks())) - {report.rank for report in found})
        if found[0] == own:
            _accuse(found, silent, self._limit)
        else:
            # The one that speaks may have come up to _GRACE later: were this one gone before, it would speak of a lost
            # rank instead.
            time.sleep(2 * _GRACE)
        # Not sys.exit, for which the main thread would have to come back.
        os._exit(_EXIT_CODE)

    def _gather(self, own: _Report) -> list[_Report]:
        """What all ranks that can answer have put up, in rank order."""
        if self._board is None:
            return [own]
        self._board.put_up(json.dumps(own))
        time.sleep(_GRACE)
        return [_Report(*json.loads(text)) for _, text in sorted(self._board.read().items())]


class _Report(NamedTuple):
    """Where a rank stands."""

    rank: int
    host: str
    num_beats: int
    waits: bool  # for other ranks
    stack: str


def _place(thread: threading.Thread) -> tuple[bool, str]:
    """Whether the thread's stack ends in something that waits for other ranks, and the stack."""
    stack = traceback.extract_stack(sys._current_frames().get(thread.ident or 0))
    return any(part in stack[-1].filename for part in _WAITING), "".join(traceback.format_list(stack))


def _accuse(found: list[_Report], silent: list[int], seconds: float) -> None:
    """Says which ranks hang: those that do not answer; else, of those not waiting for others, the ones least far."""
    limit = f"SOLVER.TIMEOUT_MINUTES={seconds / 60:g} minutes"
    remedy = "all ranks end; start again to go on from the last checkpoint, or raise it if a step may take longer"
    if silent:
        logger.error(
            "error: rank %s did not answer within %s: its process is stopped or its machine is gone; %s",
            *(", ".join(map(str, silent)), limit, remedy),
        )
        return
    suspects = [report for report in found if not report.waits] or found
    least = min(report.num_beats for report in suspects)
    for report in suspects:
        if report.num_beats == least:
            logger.error(
                "error: rank %d on %s made no step within %s; %s; it stands at\n%s",
                *(report.rank, report.host, limit, remedy, report.stack),
            )
