"""Signals of a process: the first is recorded or raises at once, the second ends the process."""

import signal
import subprocess
import sys

import pytest
from program import TIMEOUT

from reid.process.signals import MARKER, write_marker

PROGRAM = """
import os, signal, sys, time
from types import SimpleNamespace
from reid.process import signals as module
from reid.process.signals import Preempted, Signals

seconds = 0.0  # a fake clock, because a busy machine may pause between two signals
module.time = SimpleNamespace(monotonic=lambda: seconds)

signals = Signals(under_launcher="launcher" in sys.argv)
signals.install()
try:
    if "deferred" in sys.argv:
        with signals.deferred():
            for _ in range({num_signals}):
                os.kill(os.getpid(), {number})
                seconds += {pause}
            print("noted" if signals.were_received() else "nothing")
    else:
        os.kill(os.getpid(), {number})
        time.sleep(10)
except Preempted:
    print("stopped where it stood")
"""


def outcome(number: int, *arguments: str, num_signals=1, pause=0.0, ignored=False) -> tuple[int, str]:
    program = PROGRAM.format(number=int(number), num_signals=num_signals, pause=pause)
    action = signal.SIG_IGN if ignored else signal.SIG_DFL
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        preexec_fn=lambda: signal.signal(number, action),  # these tests may run under nohup themselves
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_first_one_is_noted_while_there_is_something_to_save(number):
    assert outcome(number, "deferred") == (0, "noted\n")


def test_first_signal_stops_at_once_when_nothing_to_save():
    assert outcome(signal.SIGTERM) == (0, "stopped where it stood\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_second_one_ends_the_process(number):
    assert outcome(number, "deferred", num_signals=2) == (-number, "")


def test_signal_forwarded_by_torchrun_at_once_is_not_a_second():
    assert outcome(signal.SIGTERM, "deferred", "launcher", num_signals=2) == (0, "noted\n")
    assert outcome(signal.SIGTERM, "deferred", "launcher", num_signals=2, pause=1.2) == (-signal.SIGTERM, "")


def test_a_hangup_that_nohup_ignores_stays_ignored():
    assert outcome(signal.SIGHUP, "deferred", ignored=True) == (0, "nothing\n")


def test_marker_contains_resume_instruction(tmp_path):
    write_marker(tmp_path / "run", "saved after iteration 7")
    assert (tmp_path / "run" / MARKER).read_text() == "preempted: resume me\nsaved after iteration 7\n"


def test_unwritable_folder_does_not_fail_the_marker(tmp_path):
    (tmp_path / "file").touch()
    write_marker(tmp_path / "file", "outcome")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
