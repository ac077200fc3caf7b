"""Batches from loader processes, of which some are lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from program import TIMEOUT
from refusals import refused
from torch.utils.data import Dataset

from reid.data import workers
from reid.data.workers import BatchLoader
from reid.errors import WorldError

NUM_BATCHES = 6


class Batches(Dataset):
    """A batch for each number; for the fourth one it does something else."""

    def __init__(self, fourth=lambda: None):
        self._fourth = fourth

    def __getitems__(self, number):
        return (self._fourth() if number == 3 else None) or torch.full((2, 3), number)

    def __len__(self):
        return NUM_BATCHES


@pytest.fixture(autouse=True)
def no_process_is_left():
    """A failed iteration ends with its traceback, and waits then for processes that live."""
    yield
    for child in multiprocessing.active_children():
        child.kill()


def loader(fourth=lambda: None, num_workers=2):
    return BatchLoader(Batches(fourth), range(NUM_BATCHES), num_workers=num_workers, pin_memory=False)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_come_in_order(num_workers):
    batches = loader(num_workers=num_workers)
    assert len(batches) == NUM_BATCHES
    for _ in range(2):
        assert [int(batch[0, 0]) for batch in batches] == list(range(NUM_BATCHES))


def ended_by_sigkill():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)


def exit_code_3():
    os._exit(3)


class FailsAsItIsHandedOver:
    """Unpickled in the trainer while the process that has made it dies: the connection that brings the pixels ends."""

    def __reduce__(self):
        return fail_as_the_other_dies, (os.getpid(),)


def fail_as_the_other_dies(pid):
    os.kill(pid, signal.SIGKILL)
    raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fourth", "num_workers", "words"),
    [
        (ended_by_sigkill, 1, "SIGKILL"),
        (exit_code_3, 2, "exit code 3"),
        (FailsAsItIsHandedOver, 2, "SIGKILL"),
    ],
)
def test_a_lost_process_is_named_where_its_batch_is_missing(fourth, num_workers, words):
    found = []
    with refused(WorldError, "DATALOADER.NUM_WORKERS", "rank 0", words):
        found.extend(int(batch[0, 0]) for batch in loader(fourth, num_workers))
    assert found == [0, 1, 2][: len(found)]  # it takes away what it has not handed over yet


def test_a_lost_process_raises_nothing_anywhere_else():
    before, others = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
    batches = iter(loader(num_workers=1))
    assert signal.getsignal(signal.SIGCHLD) == before
    assert int(next(batches)[0, 0]) == 0
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    worker.join()
    with refused(WorldError, "DATALOADER.NUM_WORKERS", "rank 0", "SIGKILL"):
        list(batches)


KEEPS_AN_ITERATOR = """
from torch.utils.data import Dataset
from reid.data.workers import BatchLoader
from reid.launcher import leave

class Batches(Dataset):
    def __getitems__(self, number):
        return number

kept = iter(BatchLoader(Batches(), range(1000), num_workers=2, pin_memory=False))
print(next(kept))
leave(0)
"""


@pytest.mark.slow
def test_program_exits_while_loader_workers_are_still_running():
    words = [sys.executable, "-c", KEEPS_AN_ITERATOR]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_worker_that_dies_on_start_is_reported(monkeypatch):
    monkeypatch.setattr(workers, "_ignore_signals", lambda worker_id: os._exit(1))
    start = multiprocessing.context.ForkProcess.start

    def start_and_lose(process):
        start(process)
        process.join()

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", start_and_lose)
    with refused(WorldError, "DATALOADER.NUM_WORKERS", "rank 0", "as it started"):
        iter(loader())


def fault():
    raise ZeroDivisionError


def runtime_fault():
    raise RuntimeError("of the data set")


@pytest.mark.parametrize(("fourth", "error"), [(fault, ZeroDivisionError), (runtime_fault, RuntimeError)])
def test_an_error_of_the_data_set_stays_what_it_is(fourth, error):
    with pytest.raises(error) as raised:
        list(loader(fourth, 1))
    assert type(raised.value) is error


def test_failure_to_start_workers_is_reported_in_one_sentence(monkeypatch):
    def fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    reason = "Resource temporarily unavailable"
    with refused(WorldError, "DATALOADER.NUM_WORKERS", "rank 0", "2 loader processes", reason, "NUM_WORKERS"):
        iter(loader())
