"""Lines that cannot be written are reported once, and the run continues."""

import errno
import io
import logging
import os
import re
import sys
import threading

import pytest
from program import TRAIN

from reid.process import logs
from reid.process.logs import Console, LogFile

ROOT = TRAIN.parent.parent


def is_reported_once(text, kind, reason="No space left on device"):
    return bool(re.fullmatch(rf"{kind}: [^\n]*\bstdout\b[^\n]*{reason}[^\n]*\n", text))


class Stream(io.StringIO):
    """A stream that raises on every write."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def write(self, text: str) -> int:
        raise self._error


@pytest.fixture
def logger(monkeypatch):
    monkeypatch.setattr(logs, "_has_warned", threading.Event())
    return logging.Logger("lines")  # of no other's; pytest would keep its lines


def test_a_console_that_takes_nothing_is_named_once(logger, capsys):
    logger.addHandler(Console(Stream(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))))
    logger.error("first")
    logger.error("second")
    text = capsys.readouterr().err
    assert is_reported_once(text, "warning"), text


def test_closed_stderr_too_gives_no_error(logger, monkeypatch):
    closed = Stream(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    monkeypatch.setattr(sys, "stderr", closed)
    logger.addHandler(Console(closed))
    logger.error("a line")


def test_full_disk_loses_log_lines_without_raising(logger, tmp_path, monkeypatch, capsys):
    file = LogFile(tmp_path / "log.txt")
    logger.addHandler(file)
    with monkeypatch.context() as full:
        full.setattr(file, "stream", Stream(OSError(errno.ENOSPC, "full")))
        logger.error("lost")
    logger.error("taken: %s", "\udcff")  # part of a file's name that is no text
    file.close()
    assert (tmp_path / "log.txt").read_text() == "taken: \\udcff\n"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("line", "unbuffered", "code", "kind"),
    [
        ("train.py --config_file tiny.yml OUTPUT_DIR unheard SOLVER.MAX_EPOCHS 1", "", 0, "warning"),
        ("plan.py --nodes 1 --ranks_per_node 1 --config_file tiny.yml", "", 120, "error"),
        pytest.param(
            *("plan.py --nodes 1 --ranks_per_node 1 --config_file tiny.yml", "1", 120, "error"), marks=pytest.mark.slow
        ),
        pytest.param("data.py check synthetic --config_file tiny.yml", "", 120, "error", marks=pytest.mark.slow),
        pytest.param("summarize.py finished", "", 120, "error", marks=pytest.mark.slow),
    ],
)
def test_unwritable_stdout_is_reported_once(place, line, unbuffered, code, kind):
    (place.folder / "finished").mkdir(exist_ok=True)
    (place.folder / "finished" / "result.json").write_text('{"mAP": 0.5}')
    script, *arguments = line.split()
    command = (sys.executable, ROOT / "launch" / script, *arguments)
    ended = place.command(
        "sh", "-c", 'exec "$@" > /dev/full', "", *command, environment={"PYTHONUNBUFFERED": unbuffered}
    )
    assert ended.code == code
    assert is_reported_once(ended.err, kind), ended
    if script == "train.py":
        assert (place.folder / "unheard" / "result.json").exists()


@pytest.mark.parametrize(
    "line", ["plan.py --nodes 1 --ranks_per_node 1 --config_file tiny.yml", "data.py check synthetic"]
)
def test_closed_stdout_is_reported(place, line):
    script, *arguments = line.split()
    command = (sys.executable, ROOT / "launch" / script, *arguments)
    ended = place.command("sh", "-c", 'exec "$@" >&-', "", *command)
    assert ended.code == 120
    assert is_reported_once(ended.err, "error", "Bad file descriptor"), ended
