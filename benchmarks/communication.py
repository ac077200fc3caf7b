"""Communication of a training step between the ranks: on paper, counted, and timed.

    uv run python benchmarks/communication.py [--ranks 2] [--quick]

On paper: the one packed collective of the metric losses for global batches of 64 to 4096, next to gradients, SyncBN and
the consensus flag. Counted: the gloo collectives that torch's profiler records. Timed: `global_batch` against a bare
all-gather of the same bytes, and a training step with and without `Consensus.exchange`. The script starts itself under
torchrun for what it measures (`communication_measured.py`).
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys

import torch
from tables import MIB, machine, print_line, table
from torch import nn

from reid.commands.main import exit_process
from reid.config.load import load_config
from reid.models.reid_model import build_model

BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
WORLDS = (8, 64)  # on paper, besides --ranks
NUM_PIDS = 751  # Market-1501's
FLAG = 8  # bytes of an int64
FIRST_BUCKET, BUCKET = MIB, 25 * MIB  # DistributedDataParallel's defaults


def packed_bytes(batch: int, num_features: int) -> int:
    return batch * (num_features + 1) * 4


def all_gather_bytes(payload: float, ranks: int) -> float:
    """Return the bytes of a gathered payload that a rank receives."""
    return payload * (ranks - 1) / ranks


def all_reduce_bytes(payload: float, ranks: int) -> float:
    """Return the bytes that a rank receives in a ring: once to reduce, once to distribute."""
    return 2 * payload * (ranks - 1) / ranks


def sizes(name: str) -> tuple[int, int, list[int]]:
    """Return D, the number of trainable parameters, and the channels of every BatchNorm of the real model."""
    with torch.device("meta"):
        model = build_model(load_config(None, [f"MODEL.NAME={name}"]), NUM_PIDS)
    channels = [layer.num_features for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    return model.num_features, sum(p.numel() for p in model.parameters() if p.requires_grad), channels


def num_buckets(num_parameters: int) -> int:
    return 1 + math.ceil(max(0, 4 * num_parameters - FIRST_BUCKET) / BUCKET)


def fixed_rows(num_parameters: int, channels: list[int], ranks: int) -> dict[str, tuple[int, float]]:
    """Return collectives and bytes that a rank receives, for each part that does not depend on the batch."""
    moments = ranks * sum(2 * c + 1 for c in channels) * 4
    return {
        "gradients, ring all-reduce": (num_buckets(num_parameters), all_reduce_bytes(4 * num_parameters, ranks)),
        "SyncBN forward, all-gather": (len(channels), all_gather_bytes(moments, ranks)),
        "SyncBN backward, all-reduce": (len(channels), all_reduce_bytes(8 * sum(channels), ranks)),
        "consensus flag, all-reduce": (1, all_reduce_bytes(FLAG, ranks)),
    }


def on_paper(name: str, worlds: list[int]) -> None:
    num_features, num_parameters, channels = sizes(name)
    fixed = {ranks: fixed_rows(num_parameters, channels, ranks) for ranks in worlds}
    rows: list[list[object]] = []
    for part, (num_collectives, _) in fixed[worlds[0]].items():
        rows.append([part, num_collectives, *(fixed[ranks][part][1] / MIB for ranks in worlds)])
    table(
        f"{name}: {num_parameters:,} trainable parameters, {len(channels)} BatchNorms with {sum(channels):,} channels; "
        "received by a rank in each step, whatever the batch, float32",
        ["what", "collectives", *(f"MiB, W={ranks}" for ranks in worlds)],
        rows,
    )
    rows = []
    largest = sum(received for _, received in fixed[worlds[-1]].values())
    for batch in BATCHES:
        payload = packed_bytes(batch, num_features)
        received = [all_gather_bytes(payload, ranks) for ranks in worlds]
        ratios = payload / (8 * num_parameters), received[-1] / largest
        rows.append([batch, payload / MIB, *(value / MIB for value in received), *(f"{100 * r:.2f} %" for r in ratios)])
    header = ["B", "payload MiB", *(f"received MiB, W={ranks}" for ranks in worlds)]
    table(
        f"The packed collective of the metric losses, one a step, forward only, float32 [B, {num_features} + 1]; the "
        "limit is the gradients' all-reduce; the ratio to it is the same for any W",
        [*header, "to the gradients'", f"to everything else, W={worlds[-1]}"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes for what is measured")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds, under a minute")
    parser.add_argument("--worker", action="store_true", help="one of the processes that torchrun starts")
    arguments = parser.parse_args()
    if arguments.worker:
        from communication_measured import measure

        measure(quick=arguments.quick)
        exit_process(0)
    print_line(f"communication.py --ranks {arguments.ranks}: {machine()}")
    worlds = sorted({arguments.ranks, *WORLDS})
    for name in ("resnet50", "resnet18"):  # D = 2048 and 512
        on_paper(name, worlds)
    argv = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}", __file__, "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}  # cores are shared; a quiet profiler
    argv += ["--quick"] if arguments.quick else []
    sys.exit(subprocess.run([sys.executable, *argv], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
