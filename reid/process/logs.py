"""Log lines on the console and in log.txt; a full disk or a closed pipe loses lines, but never ends the run."""

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

_EXIT_CODE = 120  # as Python exits when stdout cannot be flushed

_has_warned = threading.Event()


class Console(logging.StreamHandler[TextIO]):
    """Handler for stdout or stderr that reports only the first line that it cannot write."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            _warn_once(error)
        else:
            super().handleError(record)


class LogFile(logging.FileHandler):
    """Handler for log.txt that drops the lines that a full disk does not take."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace")  # names of files need not be valid text

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


def set_up_console() -> None:
    """Send log lines to stdout, and errors to stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it
    lines, errors = Console(sys.stdout), Console(sys.stderr)
    lines.addFilter(lambda record: record.levelno < logging.ERROR)
    lines.setLevel(logging.INFO)
    errors.setLevel(logging.ERROR)
    logger = logging.getLogger("reid")
    logger.handlers = [lines, errors]
    logger.setLevel(logging.DEBUG)  # log.txt also has the tracebacks of optional side effects
    logger.propagate = False
    logging.getLogger("ignite").addHandler(logging.NullHandler())  # it would repeat every error, twice on every rank


def write_output(text: str) -> None:
    """Write the result of a command to stdout; exit with code 120 if that is impossible."""
    try:
        if sys.stdout is None:  # closed by the parent process
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _report("error", error)
        if sys.stdout is not None:  # the interpreter would flush it again at exit, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_EXIT_CODE) from error


def flush() -> None:
    """Flush stdout and stderr before an exit without interpreter finalization."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the parent process
        try:
            stream.flush()
        except OSError as error:
            _warn_once(error)


def _warn_once(error: OSError) -> None:
    if not _has_warned.is_set():
        _has_warned.set()
        _report("warning", error, ". Its lines are lost; the run continues.")


def _report(level: str, error: OSError, outcome: str = "") -> None:
    with suppress(OSError):
        sys.stderr.write(f"{level}: stdout cannot be written to: {error.strerror}{outcome}\n")
        sys.stderr.flush()
