"""Cost of the plan of an epoch, and of a rank's part of it: CPU seconds and memory.

    uv run python benchmarks/sampler.py [--quick]

The plan lists the images of every global batch of an epoch (P identities, K images of each). Every rank makes the
complete plan, once an epoch. The limit is a sort of as many random keys, which any shuffle needs. Then follow the cost
of a rank's part of each batch, which depends on the size of that part, and 16,384 ranks on paper.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
from measuring import cost_of, costs_in_turn
from numpy.typing import NDArray
from tables import machine, print_line, table

from reid.data.samplers import IdentityPlan, TrainBatches

DATA = {"Market-1501": (751, 12_936), "MSMT17": (1_041, 32_621), "1M": (100_000, 1_000_000)}  # identities, images
K = 4  # images of an identity in a batch
RANKS = (1, 8, 64, 1024, 16_384)
LIMIT = 1.0  # CPU seconds for the largest
ROUNDS = 3


def people(name: str) -> NDArray[np.int64]:
    """Return the identities [N], each with a random number of images, at least one."""
    num_pids, num_images = DATA[name]
    more = np.random.default_rng(0).integers(num_pids, size=num_images - num_pids)
    return np.concatenate([np.arange(num_pids), more]).astype(np.int64)


def plan_of(pids: NDArray[np.int64], num_pids: int) -> IdentityPlan:
    return IdentityPlan(pids, num_pids=num_pids, num_instances=K, seed=0)


def sort_of(num_images: int) -> Callable[[], object]:
    keys = np.random.default_rng(0).integers(2**62, size=num_images)
    return lambda: np.argsort(keys, kind="stable")


def plan_row(name: str, num_pids: int) -> list[object]:
    pids = people(name)
    plan = plan_of(pids, num_pids)
    ways = {"built": lambda: plan_of(pids, num_pids), "epoch": partial(plan, 1), "sort": sort_of(len(pids))}
    costs = costs_in_turn(ways, ROUNDS)
    cpu, sort = costs["epoch"].cpu, costs["sort"].cpu
    size = 8 * plan.num_batches * num_pids * K / 1e9
    return [name, num_pids, plan.num_batches, costs["built"].cpu, cpu, sort, LIMIT, costs["epoch"].memory, size]


def part_rows(name: str, num_pids: int) -> list[list[object]]:
    """Return the cost of each further batch for a rank, once the epoch has its plan."""
    plan = plan_of(people(name), num_pids)
    rows: list[list[object]] = []
    for num_ranks in RANKS:
        if num_pids % num_ranks:
            continue
        batches = iter(TrainBatches(plan, rank=num_ranks - 1, num_ranks=num_ranks))
        first = next(batches)
        cost = cost_of(partial(deque, batches, maxlen=0))  # takes them all and keeps none
        num_steps = plan.num_batches - 1
        rows.append([num_ranks, len(first.sample_ids), num_steps, 1e6 * cost.cpu / num_steps, cost.memory])
    return rows


def on_paper(name: str, cpu: float) -> None:
    """Print the cost for 16,384 ranks with 4 images each, whose batch is larger than many data sets."""
    num_images = DATA[name][1]
    batch = RANKS[-1] * K
    print_line(
        f"\nOn paper, {RANKS[-1]:,} ranks with {K} images each, a batch of {batch:,}: {num_images // batch} steps an "
        f"epoch; every rank makes the plan in {cpu:.2g} CPU s, once an epoch and without communication "
        f"(sent instead, it would be {8 * num_images / 1e6:.3g} MB for each), and then takes {8 * K} bytes a step."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the largest, a second")
    arguments = parser.parse_args()
    print_line(f"sampler.py{' --quick' if arguments.quick else ''}: {machine()}")
    sizes = [("Market-1501", 16), ("MSMT17", 16), ("1M", 16), ("1M", 1024), ("1M", 16_384)]
    rows = [plan_row(*size) for size in (sizes[:2] if arguments.quick else sizes)]
    table(
        f"The plan of an epoch, K = {K}, median of {ROUNDS}; work: N random keys, a sort of them, and P draws a batch",
        [
            "data",
            "P",
            "batches",
            "CPU s to build",
            "CPU s an epoch",
            "a sort of N",
            "limit",
            "GB above",
            "GB of the plan",
        ],
        rows,
    )
    largest = ("MSMT17", 512) if arguments.quick else ("1M", 16_384)
    table(
        f"A rank's part of it, {largest[0]}, P = {largest[1]:,}, K = {K}, after the first batch",
        ["ranks", "images a rank", "steps", "CPU us a step", "GB above"],
        part_rows(*largest),
    )
    name, cpu = rows[-1][0], rows[-1][4]
    assert isinstance(name, str)
    assert isinstance(cpu, float)
    on_paper(name, cpu)


if __name__ == "__main__":
    main()
