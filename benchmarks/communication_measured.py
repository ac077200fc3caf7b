"""Counts and times of communication.py, measured on every rank that torchrun starts."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from communication import BATCHES, FLAG, NUM_PIDS, num_buckets, packed_bytes, sizes
from tables import MIB, print_line, seconds_of, table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from reid.config.load import load_config
from reid.distributed import collectives
from reid.distributed.accelerator import wrap
from reid.distributed.launch_environment import read_world
from reid.distributed.session import session
from reid.distributed.sync_batchnorm import synchronize_batchnorm
from reid.models.reid_model import build_model
from reid.training.criterion import Criterion
from reid.training.optim import build_optimizer

ELEMENT = {"float": 4, "double": 8, "long int": 8}  # bytes, by the profiler's names
TINY = ["MODEL.NAME=resnet18", "MODEL.DEVICE=cpu", "INPUT.SIZE_TRAIN=(32,16)", "SOLVER.IMS_PER_BATCH=16"]
STEPS = 10  # in a block, so that what a step leaves to the next is counted where it arose


def measure(*, quick: bool) -> None:
    torch.manual_seed(0)
    with session(read_world(os.environ), load_config(None, TINY)) as accelerator:
        count(accelerator)
        time_global_batch(quick=quick)
        time_agreement("steps of a small network", small_step(accelerator), num_rounds=20 if quick else 100)
        if not quick:
            time_agreement("steps of resnet18, 32x16, SyncBN", real_step(accelerator)[0], num_rounds=12)


# ---- counted ----


def collectives_of(work: Callable[[], object]) -> list[tuple[str, list[int], int]]:
    """Return kind, shape and bytes of this rank's part of every gloo collective of the work."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        record.export_chrome_trace(str(file))
        events = [event for event in json.loads(file.read_text())["traceEvents"] if "gloo:" in str(event.get("name"))]
    counted = []
    for event in events:
        (shape,), (kind,) = event["args"]["Input Dims"], event["args"]["Input type"]
        counted.append((event["name"].removeprefix("gloo:"), shape, math.prod(shape) * ELEMENT[kind]))
    return counted


def count(accelerator: Accelerator) -> None:
    """Count one call of each of our functions and one training step of a small model, and compare with the paper."""
    ranks, num_features = collectives.num_ranks(), 2048
    feat, pids = torch.randn(64 // ranks, num_features), torch.arange(64 // ranks)
    consensus = collectives.Consensus()
    gathered = collectives_of(lambda: collectives.global_batch(feat, pids))

    def exchange() -> None:
        for _ in range(10):
            consensus.exchange(0)
        time.sleep(0.5)  # until the last one has ended, for which no rank waits

    exchanged = collectives_of(exchange)
    step, num_parameters, channels = real_step(accelerator)
    for _ in range(3):  # DistributedDataParallel rebuilds its buckets after the first
        step()
    in_step = collectives_of(step)
    of_batch_norm = [part for part in in_step if len(part[1]) == 2 and part[1][0] in (1, 2)]
    packed = [part for part in in_step if part[0] == "all_gather" and part not in of_batch_norm]
    gradients = [part for part in in_step if part[0] == "all_reduce" and len(part[1]) == 1]
    forward = [part for part in of_batch_norm if part[0] == "all_gather"]
    backward = [part for part in of_batch_norm if part[0] == "all_reduce"]
    sync_forward = sum(2 * c + 1 for c in channels) * 4
    rows: list[list[object]] = [
        ["global_batch, B=64, D=2048", "1", len(gathered), packed_bytes(64, 2048) // ranks, total(gathered)],
        ["10 x Consensus.exchange", "10", len(exchanged), 10 * FLAG, total(exchanged)],
        ["step: packed features, B=16, D=512", "1", len(packed), packed_bytes(16, 512) // ranks, total(packed)],
        ["step: gradients", str(num_buckets(num_parameters)), len(gradients), 4 * num_parameters, total(gradients)],
        ["step: SyncBN forward", str(len(channels)), len(forward), sync_forward, total(forward)],
        ["step: SyncBN backward", str(len(channels)), len(backward), 8 * sum(channels), total(backward)],
        ["step: anything else", "0", len(in_step) - sum(map(len, (packed, gradients, forward, backward))), 0, 0],
    ]
    if collectives.is_main():
        header = ["what", "collectives on paper", "counted", "bytes of one rank's part on paper", "counted"]
        table(
            f"Counted with torch.profiler, {ranks} ranks, gloo; the step is resnet18's, 32x16, batch 16", header, rows
        )


def total(parts: list[tuple[str, list[int], int]]) -> int:
    return sum(part[2] for part in parts)


def real_step(accelerator: Accelerator, batch: int = 16) -> tuple[Callable[[], None], int, list[int]]:
    """Return a training step of a global batch made of parts of the package, and the size of the model."""
    cfg = load_config(None, [*TINY, f"SOLVER.IMS_PER_BATCH={batch}"])
    _, num_parameters, channels = sizes("resnet18")
    model = build_model(cfg, NUM_PIDS).train()
    synchronize_batchnorm(model)
    criterion = Criterion(cfg)
    local_batch = cfg.SOLVER.IMS_PER_BATCH // collectives.num_ranks()
    images, pids = (
        torch.randn(local_batch, 3, 32, 16),
        torch.arange(local_batch) // 4 + local_batch * collectives.rank(),
    )
    wrapped, optimizer = wrap(accelerator, model, build_optimizer(cfg.SOLVER, model))

    def step() -> None:
        losses = criterion(wrapped(images), pids, None)
        optimizer.zero_grad()
        accelerator.backward(losses.to_minimize)
        optimizer.step()

    return step, num_parameters, channels


# ---- timed ----


def time_global_batch(*, quick: bool) -> None:
    ranks, rows = collectives.num_ranks(), []
    for num_features in (512, 2048):
        for batch in BATCHES[:: 3 if quick else 1]:
            local_batch = batch // ranks
            feat, pids = torch.randn(local_batch, num_features), torch.arange(local_batch)
            packed, gathered = torch.randn(local_batch, num_features + 1), torch.empty(batch, num_features + 1)
            ours = timed_alone(partial(collectives.global_batch, feat, pids))
            bare = timed_alone(partial(dist.all_gather_into_tensor, gathered, packed))
            copied = timed_alone(partial(torch.empty_like(gathered).copy_, gathered))
            rows.append([num_features, batch, packed_bytes(batch, num_features) / MIB, ours, bare, ours / bare, copied])
    flat = torch.zeros(sizes("resnet50")[1])
    gradients = timed_alone(partial(dist.all_reduce, flat))
    if collectives.is_main():
        header = ["D", "B", "payload MiB", "global_batch ms", "bare all-gather ms (limit)", "ratio", "memcpy of it ms"]
        table(f"Time of global_batch, {ranks} ranks, gloo on one machine, 1 thread each, median of 20", header, rows)
        print_line(
            f"\nall-reduce of ResNet-50's gradients ({flat.numel() * 4 / MIB:.1f} MiB), same run: {gradients:.0f} ms"
        )


def timed_alone(work: Callable[[], object]) -> float:
    """Return milliseconds, the median of 20 calls that all ranks start at the same time."""
    times = []
    for _ in range(23):
        dist.barrier()
        times.append(seconds_of(work))
    return 1000 * statistics.median(times[3:])


def small_step(accelerator: Accelerator) -> Callable[[], None]:
    """Return a step much shorter than a real one, so that a cost would show."""
    layers = [nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 64))
    wrapped, optimizer = wrap(accelerator, net, torch.optim.SGD(net.parameters(), lr=0.01))
    images, pids = torch.randn(32, 3, 64, 32), torch.arange(32)

    def step() -> None:
        loss = nn.functional.cross_entropy(wrapped(images), pids)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()

    return step


def time_agreement(title: str, step: Callable[[], None], num_rounds: int) -> None:
    """Time blocks of steps in turn, in the same processes: twice without agreement (the noise), and with it."""
    consensus, inside = collectives.Consensus(), list[float]()
    ways: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "nothing, again (the noise)": lambda: None,
        "Consensus.exchange": lambda: inside.append(seconds_of(lambda: consensus.exchange(0))),
        "on_any_rank, which waits": lambda: collectives.on_any_rank(local=False),
    }
    names = list(ways)
    wall, cpu = ({name: list[float]() for name in names} for _ in range(2))  # seconds of a step, one of each round
    for number in range(num_rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                step()
                ways[name]()
            wall[name].append((time.perf_counter() - start) / STEPS)
            cpu[name].append((time.process_time() - cpu_start) / STEPS)
    if not collectives.is_main():
        return
    rows: list[list[object]] = []
    for name in names:
        more = [time_ - without for time_, without in zip(wall[name][1:], wall["nothing"][1:], strict=True)]
        low, middle, high = (1000 * value for value in statistics.quantiles(more, n=4))
        times = [1000 * statistics.median(measured[name][1:]) for measured in (wall, cpu)]
        ratio = statistics.median(cpu[name][1:]) / statistics.median(cpu["nothing"][1:])
        rows.append([name, *times, f"{middle:+.2f} ({low:+.2f} to {high:+.2f})", ratio])
    header = ["after every step", "wall ms a step", "CPU ms a step", "wall ms more, median (quartiles)", "CPU ratio"]
    table(
        f"Agreement: {title}, {num_rounds} rounds of {STEPS} steps each, {collectives.num_ranks()} ranks; "
        "limit: 0 ms more, ratio 1",
        header,
        rows,
    )
    middle, last = (1e6 * value for value in (statistics.median(inside), statistics.quantiles(inside, n=100)[-1]))
    print_line(
        f"\nwithin Consensus.exchange: median {middle:.0f} us, 99th percentile {last:.0f} us, {len(inside)} calls"
    )
