"""Loading ahead in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_NUM_AHEAD = 2  # items that wait for the caller

A = TypeVar("A")
B = TypeVar("B")


def prefetched(load: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """Yield load(item) for every item, loaded by one thread that is at most two items ahead.

    The thread ends with the iteration, also an abandoned one, after the item that it is loading. The interpreter waits
    for it before it exits: it would abort a daemon thread within torch.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
    upcoming = iter(items)
    loading = deque(thread.submit(load, item) for item in islice(upcoming, _NUM_AHEAD))
    try:
        while loading:
            loading.extend(thread.submit(load, item) for item in islice(upcoming, 1))
            yield loading.popleft().result()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
