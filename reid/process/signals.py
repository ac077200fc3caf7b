"""Signals that ask a run to stop: the first one is kept until the run has saved, the second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MARKER = "PREEMPTED"

# Seconds in which a repeated signal counts as the same request: the end of a job often signals all processes of a
# step, and torchrun then forwards the signal that it received.
_ECHO = 1.0

# Seconds until a signal whose exception Python dropped is sent again; by then Python has left that code.
_RETRY = 0.1


class Preempted(BaseException):
    """The run was asked to stop and has saved everything. Not an Exception, so that no library swallows it."""

    is_shared: bool = False  # as ReidError.is_shared


class Signals:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP of this process.

    Inside `deferred` the first signal is only recorded; outside it raises `Preempted`. The second signal ends the
    process as if there were no handler.

    Args:
        under_launcher: Whether torchrun may forward a signal that this process has already received.
    """

    def __init__(self, *, under_launcher: bool) -> None:
        self._under_launcher = under_launcher
        self._is_deferred = False
        self._first: tuple[int, float] | None = None

    def install(self) -> None:
        """Handle the signals from now on; must be called in the main thread."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._receive)

    def were_received(self) -> bool:
        return self._first is not None

    def release(self) -> None:
        """Restore the default actions: nothing is left to save."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def ignore(self) -> None:
        """Ignore the signals: torchrun, which ends all ranks after the first one, must not change the exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals, so that the run can save and then stop."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def repeat(self) -> None:
        """Send the first signal again in a moment, because Python dropped the exception that it raised."""
        assert self._first is not None
        number, _ = self._first
        self._first = None
        timer = threading.Timer(_RETRY, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

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


def write_marker(folder: Path, outcome: str) -> None:
    """Write the file into the run directory that makes a job script start the run again."""
    with suppress(OSError):  # a full disk; the exit code has the same meaning
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(f"preempted: resume me\n{outcome}\n", encoding="utf-8")
