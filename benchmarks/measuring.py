"""Measurements for the benchmark scripts: wall-clock and CPU seconds, peak memory, several ways in turn."""

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
    """Cost of some work."""

    cpu: float  # seconds, user and system, of all threads
    seconds: float
    memory: float  # GB above those in use before: of the GPU if there is one, else of the process


def device() -> torch.device:
    """Return the device that a run would use."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait_for_device() -> None:
    """Wait for the GPU, which works asynchronously."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """Return the CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cost_of(work: Callable[[], object]) -> Cost:
    """Return the cost of the work, until the device has finished it."""
    wait_for_device()
    before = _start_peak()
    cpu, start = cpu_seconds(), time.perf_counter()
    work()
    wait_for_device()
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return Cost(cpu, seconds, _peak() - before)


def costs_in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Cost]:
    """Return medians of several ways, run in turn, so that a slower machine affects all of them."""
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            costs[name].append(cost_of(work))
    return {name: _median(of_one) for name, of_one in costs.items()}


def _median(costs: list[Cost]) -> Cost:
    columns = ([cost.cpu for cost in costs], [cost.seconds for cost in costs], [cost.memory for cost in costs])
    cpu, seconds, memory = map(statistics.median, columns)
    return Cost(cpu, seconds, memory)


def _start_peak() -> float:
    """Return the GB in use now; the peak is counted from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    return _status("VmRSS")


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> float:
    """Return an entry of this process's status in GB."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024 / 1e9
