"""Scaling of training with ranks: measured on this machine, counted, and modeled on paper for 8 to 1,024 GPUs.

    uv run python benchmarks/scaling.py [--quick]

Measured: a step of resnet18 (32x16) under torchrun with 1, 2 and 4 ranks, one thread each; weak (16 images a rank) and
strong (16 in all). More ranks than cores share them, so CPU seconds of all ranks together count: the limit is those of
one rank. On paper: a step of ResNet-50 with 64 images a GPU (weak) and 512 in all (strong), and an evaluation of
Market-1501, with the figures that it rests on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time

import torch
from communication import all_gather_bytes, fixed_rows, packed_bytes, sizes
from tables import MIB, machine, print_line, table
from torch.utils.flop_counter import FlopCounterMode

from reid.commands.main import exit_process
from reid.config.load import load_config
from reid.models.reid_model import build_model
from reid.retrieval.metrics import QUERY_BLOCK

RANKS, IMAGES = (1, 2, 4), 16
STEPS, WARM_UP = 20, 3
WORLDS = (1, 8, 16, 64, 256, 1024)
PER_GPU, STRONG = 64, 512  # images

# Figures that the estimates on paper use: published ones of the H200 and NCCL, and guesses, which are marked.
FIGURES: dict[str, tuple[float, str]] = {
    "images": (4_000, "images/s that a GPU trains alone (the project's target; guess)"),
    "embedded": (12_000, "images/s that it embeds: a third of the work (guess)"),
    "float32": (60e12, "FLOP/s of a float32 product (67e12 published)"),
    "memory": (4.8e12, "bytes/s of the GPU's memory"),
    "inside": (0.7 * 450e9, "bytes/s of a collective within a node: 70 % of NVLink's 450e9 (guess of the share)"),
    "between": (0.7 * 400e9, "bytes/s between nodes, of 8 GPUs with a 400 Gbit/s link each: 70 % (guess of the share)"),
    "hop": (3e-6, "s of latency for each doubling of the ranks in a node (guess)"),
    "far hop": (10e-6, "s likewise between nodes (guess)"),
    "launch": (10e-6, "s to start a collective (guess)"),
    "overlap": (0.6, "share of the step, its backward pass, during which gradients are exchanged"),
}
NODE = 8  # GPUs


def figure(name: str) -> float:
    return FIGURES[name][0]


# ---- measured ----


def worker(images: int) -> None:
    """Run in each process that torchrun starts; rank 0 prints seconds and CPU seconds of a step."""
    from communication_measured import TINY, real_step

    from reid.distributed import collectives
    from reid.distributed.launch_environment import read_world
    from reid.distributed.session import session

    torch.manual_seed(0)
    with session(read_world(os.environ), load_config(None, TINY)) as accelerator:
        step = real_step(accelerator, images * collectives.num_ranks())[0]
        seconds, cpu = [], []
        for _ in range(WARM_UP + STEPS):
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
        used = collectives.sum_over_ranks(torch.tensor(statistics.median(cpu[WARM_UP:]), dtype=torch.float64))
        if collectives.is_main():
            print_line(json.dumps([statistics.median(seconds[WARM_UP:]), float(used)]))


def measured(num_ranks: int, images: int) -> tuple[float, float]:
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_ranks}",
        __file__,
        "--worker",
        str(images),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True, text=True)
    seconds, cpu = json.loads(done.stdout.splitlines()[-1])
    return seconds, cpu


def scaling(title: str, images_of: dict[int, int]) -> None:
    num_features, num_parameters, channels = sizes("resnet18")
    rows: list[list[object]] = []
    of_one_rank = 0.0
    for num_ranks, images in images_of.items():
        seconds, cpu = measured(num_ranks, images)
        total = num_ranks * images
        sent = sum(received for _, received in fixed_rows(num_parameters, channels, num_ranks).values())
        sent += all_gather_bytes(packed_bytes(total, num_features), num_ranks)
        of_one_rank = of_one_rank or cpu / total
        speeds = [1e3 * seconds, total / seconds, cpu / total, cpu / total / of_one_rank]
        rows.append([num_ranks, images, total, *speeds, sent / MIB])
    table(
        f"{title}: resnet18, 32x16, median of {STEPS} steps, {os.cpu_count()} cores",
        [
            "ranks",
            "images a rank",
            "images",
            "ms a step",
            "images/s",
            "CPU s an image",
            "to one rank's (limit 1)",
            "MiB received by a rank in a step",
        ],
        rows,
    )


# ---- on paper ----


def latency(ranks: int) -> float:
    """Return the latency of a tree over the GPUs of a node and one over the nodes."""
    inside, nodes = min(ranks, NODE), max(1, ranks // NODE)
    return (
        figure("launch") + figure("hop") * math.log2(inside) + figure("far hop") * math.log2(nodes)
        if ranks > 1
        else 0.0
    )


def transfer(num_bytes: float, ranks: int) -> float:
    return num_bytes / figure("inside" if ranks <= NODE else "between")


def step_on_paper(ranks: int, images: float) -> dict[str, float]:
    """Return the seconds of each part of a step."""
    num_features, num_parameters, channels = sizes("resnet50")
    batch = images * ranks
    compute = images / figure("images")
    fixed = fixed_rows(num_parameters, channels, ranks)
    num_buckets, gradient_bytes = fixed["gradients, ring all-reduce"]
    gradients = transfer(gradient_bytes, ranks) + num_buckets * 2 * latency(ranks)
    sync = sum(
        transfer(fixed[key][1], ranks) + fixed[key][0] * latency(ranks) for key in fixed if key.startswith("SyncBN")
    )
    packed = all_gather_bytes(packed_bytes(round(batch), num_features), ranks)
    triplets = 2 * batch**2 * num_features / figure("float32") + 4 * 4 * batch**2 / figure("memory")
    return {
        "compute": compute,
        "gradients not hidden": max(0.0, gradients - figure("overlap") * compute),
        "SyncBN": sync,
        "gather": transfer(packed, ranks) + latency(ranks),
        "triplets": triplets,
    }


def steps_on_paper(title: str, images_of: dict[int, float]) -> None:
    rows: list[list[object]] = []
    for ranks, images in images_of.items():
        parts = step_on_paper(ranks, images)
        total = sum(parts.values())
        efficiency = parts["compute"] / total
        rows.append(
            [
                ranks,
                images,
                round(images * ranks),
                *(1e3 * seconds for seconds in parts.values()),
                1e3 * total,
                images * ranks / total,
                f"{100 * efficiency:.0f} %",
            ]
        )
    table(
        f"On paper, {title}; ms",
        ["GPUs", "images a GPU", "batch", *step_on_paper(1, 1), "step", "images/s", "of the ideal"],
        rows,
    )


def evaluation_on_paper() -> None:
    num_queries, num_gallery, num_features = 3_368, 15_913, 2048
    num_images = num_queries + num_gallery
    flops = 2 * num_queries * num_gallery * num_features
    rows: list[list[object]] = []
    for ranks in WORLDS:
        embed = num_images / figure("embedded") / ranks
        gather = transfer(all_gather_bytes(4 * num_images * num_features, ranks), ranks) + latency(ranks)
        rank = flops / figure("float32") / min(ranks, math.ceil(num_queries / QUERY_BLOCK))
        rows.append([ranks, 1e3 * embed, 1e3 * gather, 1e3 * rank, 1e3 * (embed + gather + rank)])
    table(
        f"On paper, an evaluation of Market-1501 ({num_images:,} images, product {flops / 1e9:,.0f} GFLOP in "
        f"blocks of {QUERY_BLOCK} queries); ms",
        ["GPUs", "embedding", "gather", "ranking", "all"],
        rows,
    )


def on_paper() -> None:
    with torch.device("meta"):
        model = build_model(load_config(None, []), 751)
        images = torch.empty(1, 3, 256, 128)
    counter = FlopCounterMode(display=False)
    with counter:
        model.base(images)
    flops = counter.get_total_flops()
    print_line(
        f"\nResNet-50, last stride 1, 256x128: {flops / 1e9:.3g} GFLOP forward, three times that to train an image: "
        f"{figure('images'):,.0f} images/s are {3 * flops * figure('images') / 1e12:.3g} TFLOP/s."
    )
    table(
        "The figures that the estimates on paper use",
        ["figure", "meaning"],
        [[f"{value:.3g}", meaning] for value, meaning in FIGURES.values()],
    )
    steps_on_paper(f"weak scaling, ResNet-50, {PER_GPU} images a GPU", dict.fromkeys(WORLDS, float(PER_GPU)))
    strong = {ranks: STRONG / ranks for ranks in WORLDS if STRONG // ranks >= 4}
    steps_on_paper(f"strong scaling, ResNet-50, {STRONG} images in all", strong)
    evaluation_on_paper()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="on paper only, seconds")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="to measure, each a divisor of 16")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
        exit_process(0)
    print_line(f"scaling.py{' --quick' if arguments.quick else ''}: {machine()}")
    if not arguments.quick:
        scaling("Weak", dict.fromkeys(arguments.ranks, IMAGES))
        scaling("Strong", {ranks: IMAGES // ranks for ranks in arguments.ranks})
    on_paper()


if __name__ == "__main__":
    main()
