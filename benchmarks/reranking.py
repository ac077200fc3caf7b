"""Cost of k-reciprocal re-ranking compared with the matrix product under it: CPU seconds, seconds and memory.

    uv run python benchmarks/reranking.py [--quick] [--threads 1]

Every row is measured in a separate process. "product": only the squared distances of all images in blocks of rows.
"blocks": the re-ranked distances in blocks of 256 queries, as in evaluation. "distmat": `k_reciprocal`, which returns
all of them. "dense": the algorithm with complete N x N matrices in numpy (tests/reference.py). Memory is the peak above
the process with its embeddings, which are generated (benchmarks/embeddings.py). The memory law is the peak memory by
the number of images at few features, extrapolated to the size of MSMT17.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from embeddings import draw
from measuring import cpu_seconds
from tables import machine, print_line, table
from torch import Tensor

from reid.retrieval.neighbours import row_blocks
from reid.retrieval.reranking import KReciprocal, k_reciprocal

QUERY_BLOCK = 256
SIZES = {"N = 4,000": (700, 3_300, 2048), "Market-1501": (3_368, 15_913, 2048)}
LAW = [(1_750, 8_250, 64), (3_500, 16_500, 64), (7_000, 33_000, 64), (11_659, 82_161, 64)]  # the last is MSMT17's
NUM_FEATURES = 2048


def product(q: Tensor, g: Tensor) -> None:
    both = torch.cat([q, g])
    squared_norm = torch.linalg.vector_norm(both, dim=1).square()
    for block in row_blocks(len(both)):
        torch.addmm(squared_norm, both[block], both.T, alpha=-2)


def blocks(q: Tensor, g: Tensor) -> None:
    reranked = KReciprocal(q, g, 20, 6, 0.3)
    for start in range(0, len(q), QUERY_BLOCK):
        reranked.distances(slice(start, min(start + QUERY_BLOCK, len(q))))


def dense(q: Tensor, g: Tensor) -> None:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import reference

    both = torch.cat([q, g]).numpy()
    squared_norm = np.square(both).sum(1)
    distances = squared_norm[:, None] + squared_norm - 2 * both @ both.T
    reference.k_reciprocal(distances, len(q), 20, 6, 0.3)


WAYS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "product": product,
    "blocks": blocks,
    "distmat": k_reciprocal,
    "dense": dense,
}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(way: str, num_queries: int, num_gallery: int, num_features: int, threads: int) -> None:
    torch.set_num_threads(threads)
    both = draw(num_queries + num_gallery, num_features, torch.device("cpu")).embedding
    q, g = both[:num_queries], both[num_queries:]
    memory, cpu, clock = peak_gb(), cpu_seconds(), time.perf_counter()
    WAYS[way](q, g)
    print_line(json.dumps([cpu_seconds() - cpu, time.perf_counter() - clock, peak_gb() - memory]))


def measured(way: str, size: tuple[int, int, int], threads: int) -> tuple[float, float, float]:
    """Return CPU seconds, seconds and GB, measured in a separate process."""
    command = [sys.executable, __file__, "--threads", str(threads), "--measure", way, *map(str, size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    cpu, clock, memory = json.loads(done.stdout)
    return cpu, clock, memory


def speed(name: str, size: tuple[int, int, int], ways: list[str], threads: int) -> None:
    num_queries, num_gallery, num_features = size
    num_images = num_queries + num_gallery
    flops = 2 * num_images**2 * num_features
    rows: list[list[object]] = []
    for way in ways:
        cpu, clock, memory = measured(way, size, threads)
        rows.append([way, cpu, cpu / float(rows[0][1]) if rows else 1.0, clock, memory, flops / cpu / 1e9])
    table(
        f"{name}: Q = {num_queries:,}, G = {num_gallery:,}, D = {num_features:,}; product 2 N^2 D = "
        f"{flops / 1e12:.3g} TFLOP, an N x N float32 matrix {4 * num_images**2 / 1e9:.3g} GB, the embeddings "
        f"{4 * num_images * num_features / 1e9:.3g} GB",
        ["way", "CPU s", "to the product", "s", "GB above", "GFLOP of the product per CPU s"],
        rows,
    )


def memory_law(sizes: list[tuple[int, int, int]], threads: int) -> None:
    rows: list[list[object]] = []
    for size in sizes:
        _, _, memory = measured("blocks", size, threads)
        num_images = size[0] + size[1]
        rows.append([num_images, memory, 1e9 * memory / num_images, 4 * num_images**2 / 1e9])
    table(
        f"Memory of blocks, D = {sizes[0][2]}",
        ["N", "GB above", "bytes per image", "one N x N float32 matrix, GB"],
        rows,
    )
    more = 4 * (NUM_FEATURES - sizes[0][2]) * num_images / 1e9
    print_line(
        f"\nWith D = {NUM_FEATURES:,} the copies of N = {num_images:,} embeddings take {more:.3g} GB more: "
        f"{memory + more:.3g} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small sizes only, a minute on a free machine")
    parser.add_argument("--threads", type=int, default=1, help="waiting threads count as CPU seconds on busy machines")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, *size = arguments.measure
        num_queries, num_gallery, num_features = map(int, size)
        measure(way, num_queries, num_gallery, num_features, arguments.threads)
        return
    print_line(f"reranking.py --threads {arguments.threads}: {machine()}")
    for name, size in SIZES.items():
        if name == "N = 4,000":
            speed(name, size, ["product", "blocks", "distmat", "dense"], arguments.threads)
        elif not arguments.quick:
            speed(name, size, ["product", "blocks", "distmat"], arguments.threads)
    memory_law(LAW[:2] if arguments.quick else LAW, arguments.threads)


if __name__ == "__main__":
    main()
