"""Batches from loader processes, and what is said where one of them is lost."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import active_children, connection
from multiprocessing.process import BaseProcess
from typing import TypeVar
from weakref import WeakSet

from torch.utils.data import DataLoader, Dataset

from reid import distributed
from reid.errors import WorldError
from reid.preemption import SIGNALS

B = TypeVar("B")

_started: WeakSet[BaseProcess] = WeakSet()

_PATIENCE, _GRACE = 5.0, 0.1  # seconds between the end of what a process says, of its files, and its own


class BatchLoader(DataLoader[B]):
    """A DataLoader whose data set makes whole batches.

    A lost process is noticed where a batch of it is missing, up to 5 s later, and nowhere else. DataLoader would raise
    wherever the program just stands: in a destructor, in a library that goes on after any exception, while it ends.

    Args:
        dataset: its `__getitems__` takes what the sampler gives, and returns the batch.
        batches: the sampler, one item for each batch.
        num_workers: loader processes; 0: load in this one.
        pin_memory: whether batches lie in page-locked memory.

    Raises:
        WorldError: while iterating, a loader process is gone or cannot be started.
    """

    def __init__(self, dataset: Dataset[B], batches: Iterable[object], *, num_workers: int, pin_memory: bool) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,  # type: ignore[arg-type]  # gives whatever the data set takes for a list of ids
            num_workers=num_workers,
            # Python 3.14 would start them from a server instead, which imports torch anew and is sent all pixels.
            multiprocessing_context="fork" if num_workers else None,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_signals,
        )

    def __iter__(self) -> Iterator[B]:  # type: ignore[override]  # DataLoader promises its own kind
        if not self.num_workers:
            return super().__iter__()
        handler, others = signal.getsignal(signal.SIGCHLD), active_children()
        try:
            batches = super().__iter__()
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise _lost("as it started") from error
        except OSError as error:
            raise WorldError(
                f"rank {distributed.rank()} cannot start {self.num_workers} loader processes: {error.strerror}; "
                "lower DATALOADER.NUM_WORKERS, or raise what the machine allows",
                key="DATALOADER.NUM_WORKERS",
            ) from error
        finally:
            if signal.getsignal(signal.SIGCHLD) != handler:
                signal.signal(signal.SIGCHLD, handler)
        workers = [child for child in active_children() if child not in others]
        _started.update(workers)
        if len(workers) < self.num_workers:
            raise _lost("as it started")
        return _handed_over(batches, workers)


@atexit.register
def _end_all() -> None:
    """Before multiprocessing waits for them, behind a SIGTERM that they ignore, where an iterator is still alive."""
    for worker in _started:
        worker.kill()


def _handed_over(batches: Iterator[B], workers: Sequence[BaseProcess]) -> Iterator[B]:
    try:
        yield from batches
    except (RuntimeError, EOFError, OSError) as error:
        if not isinstance(error, RuntimeError):  # it dies while it hands a batch over, and is not gone yet
            connection.wait([worker.sentinel for worker in workers], _PATIENCE)
        for worker in workers:
            worker.join(_GRACE)
        ends = [worker.exitcode for worker in workers if worker.exitcode]
        if not ends:
            raise
        for worker in workers:  # they may wait for ever for what the lost one has locked
            worker.kill()
        raise _lost(f"exit code {ends[0]}" if ends[0] > 0 else f"ended by {signal.Signals(-ends[0]).name}") from error


def _lost(how: str) -> WorldError:
    return WorldError(
        f"rank {distributed.rank()} has lost a loader process, {how}; often the memory or /dev/shm was full: lower "
        "DATALOADER.NUM_WORKERS; the same command goes on from the last checkpoint",
        key="DATALOADER.NUM_WORKERS",
    )


def _as_it_is(batch: B) -> B:
    return batch


def _ignore_signals(worker_id: int) -> None:
    """torchrun signals the whole process group; a dying worker would end the trainer before it could save."""
    del worker_id
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
