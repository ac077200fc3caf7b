"""Watchdog that ends all ranks when one of them hangs, and logs its stack."""

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

from reid.distributed import collectives

logger = logging.getLogger(__name__)

_EXIT_CODE = 1
_GRACE = 3.0  # seconds between the timeouts of the first and the last rank that can still answer
# Files of the innermost frame of a rank that waits for the others: in a collective, or in a backward pass with one.
_WAITING = ("torch/distributed/", "torch/autograd/", "ignite/distributed/", "torch/nn/parallel/")


class Watchdog:
    """A thread that ends the process when the main thread has made no progress for too long.

    All ranks time out at about the same time, because those that do not hang wait for the one that does. Each of them
    publishes its state, and the lowest rank that can still answer reports which rank hangs.

    Args:
        minutes: Longest time without progress.
    """

    def __init__(self, minutes: float) -> None:
        self._limit = 60 * minutes
        self._main = threading.main_thread()
        self._num_beats, self._last_beat = 0, time.monotonic()
        self._is_over = threading.Event()
        self._board = collectives.Noticeboard("hang", _GRACE) if collectives.num_ranks() > 1 else None

    def beat(self) -> None:
        """Record progress."""
        self._num_beats += 1
        self._last_beat = time.monotonic()

    def attach(self, trainer: Engine) -> None:
        for event in (Events.GET_BATCH_STARTED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
            trainer.add_event_handler(event, self.beat)

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(min(1.0, self._limit / 10)):
            if time.monotonic() - self._last_beat > self._limit:
                self._end_process()

    def _end_process(self) -> None:
        local = _State(collectives.rank(), platform.node(), self._num_beats, *_position(self._main))
        try:
            # In a thread, because it waits forever if rank 0's process, which keeps the board, is stopped.
            states = ThreadPoolExecutor(1).submit(self._exchange, local).result(timeout=3 * _GRACE)
        except Exception:  # store and thread may fail in any way, and this process must end
            states, silent = [local], [0]
        else:
            silent = sorted(set(range(collectives.num_ranks())) - {state.rank for state in states})
        if states[0] == local:
            _report(states, silent, f"SOLVER.TIMEOUT_MINUTES={self._limit / 60:g} minutes")
        else:
            # The reporting rank may be up to _GRACE later; if this rank had ended, it would report a lost rank.
            time.sleep(2 * _GRACE)
        os._exit(_EXIT_CODE)  # sys.exit would need the main thread

    def _exchange(self, local: _State) -> list[_State]:
        """Return the states of all ranks that can answer, in rank order."""
        if self._board is None:
            return [local]
        self._board.post(json.dumps(local))
        time.sleep(_GRACE)
        return [_State(*json.loads(text)) for _, text in sorted(self._board.read().items())]


class _State(NamedTuple):
    """The state of a rank at its timeout."""

    rank: int
    host: str
    num_beats: int
    is_waiting: bool  # for other ranks
    stack: str


def _position(thread: threading.Thread) -> tuple[bool, str]:
    """Return whether the thread waits for other ranks, and its stack."""
    stack = traceback.extract_stack(sys._current_frames().get(thread.ident or 0))
    return any(part in stack[-1].filename for part in _WAITING), "".join(traceback.format_list(stack))


def _report(states: list[_State], silent: list[int], limit: str) -> None:
    """Log the ranks that do not answer; else, of those that do not wait for others, those with the least progress."""
    fix = "Fix: start again to resume from the last checkpoint, or raise it if a step may take longer."
    if silent:
        ranks = ", ".join(map(str, silent))
        cause = "its process is stopped or its machine is gone"
        logger.error("error: rank %s did not answer within %s: %s. All ranks end. %s", ranks, limit, cause, fix)
        return
    suspects = [state for state in states if not state.is_waiting] or states
    least = min(state.num_beats for state in suspects)
    for rank, host, num_beats, _, stack in suspects:
        if num_beats == least:
            text = "error: rank %d on %s made no step within %s. All ranks end. %s Its stack:\n%s"
            logger.error(text, rank, host, limit, fix, stack)
