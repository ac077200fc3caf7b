"""Speed of collectives over all ranks, within each node, and between neighboring nodes."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from reid.distributed import collectives

_SMALL, _LARGE = 8, 1 << 25  # bytes
_ROUNDS = {_SMALL: 20, _LARGE: 3}


@dataclass(frozen=True)
class Link:
    """Speed of an all-reduce among some ranks."""

    name: str
    num_ranks: int
    latency: float  # seconds for 8 bytes
    seconds: float  # seconds for 32 MiB

    @property
    def bandwidth(self) -> float:
        """Return the bytes that each rank sends per second in a ring."""
        return 2 * (self.num_ranks - 1) / self.num_ranks * _LARGE / self.seconds


def measure(device: torch.device) -> list[Link]:
    """Measure all ranks, the ranks of each node, and each node's first rank with the next node's; all ranks call it.

    Args:
        device: Device of the tensors of this rank.

    Returns:
        The same links on all ranks; none for a single rank.
    """
    if collectives.num_ranks() == 1:
        return []
    hosts = collectives.gather_objects(platform.node())
    groups = {"all ranks": list(range(len(hosts))), **_within(hosts), **_between(hosts)}
    return [_measure(name, ranks, device) for name, ranks in groups.items()]


def _within(hosts: list[str]) -> dict[str, list[int]]:
    """Return the ranks of each node that has several, if there are several nodes."""
    nodes = {host: [rank for rank, other in enumerate(hosts) if other == host] for host in hosts}
    return {f"within {host}": ranks for host, ranks in nodes.items() if len(ranks) > 1 and len(nodes) > 1}


def _between(hosts: list[str]) -> dict[str, list[int]]:
    """Return the first ranks of each node and the next one, and of the last node and the first."""
    first = {host: hosts.index(host) for host in hosts}
    names = list(first)
    pairs = zip(names, names[1:] + names[:1] if len(names) > 2 else names[1:], strict=False)
    return {f"{one} - {other}": sorted([first[one], first[other]]) for one, other in pairs}


def _measure(name: str, ranks: list[int], device: torch.device) -> Link:
    """Return the slowest rank's median; all ranks call it."""
    group = dist.new_group(ranks)
    local = {}
    for num_bytes, rounds in _ROUNDS.items():
        if collectives.rank() in ranks:
            tensor = torch.zeros(num_bytes // 4, device=device)
            seconds = [_seconds(tensor, group) for _ in range(rounds + 1)]
            local[num_bytes] = statistics.median(seconds[1:])
    measured = [of_rank for of_rank in collectives.gather_objects(local) if of_rank]
    dist.destroy_process_group(group)
    slowest = {num_bytes: max(of_rank[num_bytes] for of_rank in measured) for num_bytes in _ROUNDS}
    return Link(name, len(ranks), slowest[_SMALL], slowest[_LARGE])


def _seconds(tensor: torch.Tensor, group: Any) -> float:
    start = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - start
