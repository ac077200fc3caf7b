"""Where lines go, and what happens where they cannot go there."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_UNENCODABLE = "backslashreplace"  # names of files need not be text in any encoding
_UNANSWERED = 120  # as Python has it

_warned = threading.Event()


class Console(logging.StreamHandler[TextIO]):
    """stdout or stderr, which may be a full disk or have nobody who reads: said once, and the work goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            _warn(error)
        else:
            super().handleError(record)


class LogFile(logging.FileHandler):
    """log.txt, of which a full disk takes lines away and nothing else."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8", errors=_UNENCODABLE)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def set_up_console() -> None:
    """What happens goes to stdout, what went wrong to stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_UNENCODABLE)  # as stderr is
    ours = logging.getLogger("reid")
    ours.handlers.clear()
    ours.setLevel(logging.DEBUG)  # log.txt also has the tracebacks of optional side effects
    ours.propagate = False
    happenings, errors = Console(sys.stdout), Console(sys.stderr)
    happenings.addFilter(lambda record: record.levelno < logging.ERROR)
    happenings.setLevel(logging.INFO)
    errors.setLevel(logging.ERROR)
    ours.addHandler(happenings)
    ours.addHandler(errors)
    # Ignite would tell every error too, twice on every rank.
    logging.getLogger("ignite").addHandler(logging.NullHandler())


def answer(text: str) -> None:
    """Writes what a program was asked for to stdout; where that takes nothing, the program ends, with code 120."""
    stdout = sys.stdout
    try:
        if stdout is None:  # closed by whoever started it
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        stdout.write(text)
        stdout.flush()
    except OSError as error:
        _say("error", error)
        if stdout is not None:  # Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        raise SystemExit(_UNANSWERED) from error


def flush() -> None:
    """What is not written yet, at the end of a program."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by whoever started it
        try:
            stream.flush()
        except OSError as error:
            _warn(error)


def _warn(error: OSError) -> None:
    if not _warned.is_set():
        _warned.set()
        _say("warning", error, "; what is said there is lost, and the work goes on")


def _say(kind: str, error: OSError, outcome: str = "") -> None:
    with suppress(OSError):  # nobody is left to tell
        sys.stderr.write(f"{kind}: stdout cannot be written to: {error.strerror}{outcome}\n")
        sys.stderr.flush()
