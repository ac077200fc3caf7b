"""What the benchmark scripts measure with: seconds of the clock and of CPUs, peak memory, whole runs in turn."""

from __future__ import annotations

import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Cost:
    """Of some work."""

    cpu: float  # seconds, user and system, of all threads
    seconds: float
    memory: float  # GB above what was held before: of the GPU where there is one, else of the process


def device() -> torch.device:
    """Where a user's run would be."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for_device() -> None:
    """A GPU works on while Python goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """Of this process until now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cost_of(work: Callable[[], object]) -> Cost:
    """Of the work, until the device has done it."""
    wait_for_device()
    before = _begin_peak()
    cpu, begun = cpu_seconds(), time.perf_counter()
    work()
    wait_for_device()
    seconds, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    return Cost(cpu, seconds, _peak() - before)


def costs_in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Cost]:
    """Medians of several ways to do the same, taken in turn, so that a machine that slows down does so for all."""
    found: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(cost_of(work))
    return {name: _median(costs) for name, costs in found.items()}


def _median(costs: list[Cost]) -> Cost:
    columns = ([cost.cpu for cost in costs], [cost.seconds for cost in costs], [cost.memory for cost in costs])
    cpu, seconds, memory = map(statistics.median, columns)
    return Cost(cpu, seconds, memory)


def _begin_peak() -> float:
    """GB held now; the peak is counted from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    return _status("VmRSS")


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> float:
    """GB, as Linux counts them for this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e9
