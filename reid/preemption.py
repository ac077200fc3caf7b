"""Signals that ask a run to stop: noted until it has saved; a second one is obeyed at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MARKER = "PREEMPTED"

# Seconds in which the same signal again is taken for the same request: a job's end often signals the whole step, and
# torchrun then passes its own on.
_ECHO = 1.0

# Seconds in which Python leaves the place where it drops exceptions.
_AGAIN = 0.1


class Preempted(BaseException):
    """The run was asked to stop, and all that there is to save is saved. No Exception: no library may swallow it."""

    is_shared: bool = False  # as that of ReidError


class Signals:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP of this process.

    Outside of `deferred` the first one raises `Preempted` where the program stands; inside it is only noted. The second
    one ends the process as if nobody had ever caught it.

    Args:
        under_launcher: whether torchrun may pass on a signal that this process has had already.
    """

    def __init__(self, *, under_launcher: bool) -> None:
        self._under_launcher = under_launcher
        self._is_deferred = False
        self._first: tuple[int, float] | None = None

    def install(self) -> None:
        """Takes the signals over, for as long as the process lives; only in its main thread."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which nohup ignores
                signal.signal(number, self._receive)

    def were_received(self) -> bool:
        return self._first is not None

    def release(self) -> None:
        """Gives the signals back: there is nothing left to save."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def ignore(self) -> None:
        """All is done: torchrun, which ends all processes with the first that ends, shall not spoil the exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are noted in here, for the work to come to a good end by itself."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def repeat(self) -> None:
        """The first one again in a moment, because Python has dropped what it raised."""
        assert self._first is not None
        number, _ = self._first
        self._first = None
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self._first is None:
            self._first = (number, now)
            if not self._is_deferred:
                raise Preempted
        elif not (self._under_launcher and self._first[0] == number and now - self._first[1] < _ECHO):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def write_marker(folder: Path, words: str) -> None:
    """Leaves word in the run's folder that the run is to be started again; a job script looks for the file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(f"preempted: resume me\n{words}\n", encoding="utf-8")
    except OSError:
        pass  # a full disk; the exit code says it too
