"""Cost of CMC and mAP compared with the matrix product under them: CPU seconds, seconds and memory.

    uv run python benchmarks/evaluation.py [--quick] [--threads 1] [--rounds 3] [--no-msmt17]

"product" is only the float32 product of queries and gallery in the same blocks of queries: the limit. The other rows
are `retrieval_scores`, first of well separated identities, as of a trained model. With "untrained" they are not
separated: the last match of a query is farther than most images, which must all be sorted. With "ties" features are
rounded, so that each match ties with many images. The ways run in turn, and medians are reported. Memory is the peak
above the features. The memory law has 256 queries against galleries of up to a million images. A GPU is used if there
is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from embeddings import Embeddings, draw
from measuring import Cost, cost_of, costs_in_turn, device
from tables import machine, print_line, table
from torch import Tensor

from reid.retrieval.metrics import query_blocks, retrieval_scores

Size = tuple[int, int, int]  # Q, G, D
MARKET, MSMT17, QUICK = (3_368, 15_913, 2048), (11_659, 82_161, 2048), (337, 1_591, 2048)
LAW = (10_000, 100_000, 1_000_000)
LAW_QUERIES, LAW_FEATURES = 256, 64
UNTRAINED = 100.0  # spread of the images of an identity, as of an untrained model
LEVELS = 20.0  # steps per unit of rounded features, so that distances tie


def product(q: Tensor, g: Tensor) -> None:
    """Compute every distance once, one block of queries at a time, and keep none."""
    for block in query_blocks(len(q), len(g)):
        torch.mm(q[block], g.T)


def evaluation(drawn: Embeddings, num_queries: int, distance: str) -> None:
    parts = (slice(None, num_queries), slice(num_queries, None))
    q, g = ((drawn.embedding[part], drawn.pids[part], drawn.camids[part]) for part in parts)
    retrieval_scores(*q, *g, distance="cosine" if distance == "cosine" else "euclidean")


def ways(size: Size, *, with_worst: bool) -> dict[str, Callable[[], object]]:
    num_queries, num_gallery, num_features = size
    drawn = draw(num_queries + num_gallery, num_features, device())
    q, g = drawn.embedding[:num_queries], drawn.embedding[num_queries:]
    result: dict[str, Callable[[], object]] = {
        "product (limit)": partial(product, q, g),
        "cosine": partial(evaluation, drawn, num_queries, "cosine"),
        "Euclidean": partial(evaluation, drawn, num_queries, "euclidean"),
    }
    if with_worst:
        for name, levels in (("Euclidean, untrained", 0), ("Euclidean, untrained, ties", LEVELS)):
            worst = draw(num_queries + num_gallery, num_features, device(), spread=UNTRAINED, levels=levels)
            result[name] = partial(evaluation, worst, num_queries, "euclidean")
    return result


def speed(name: str, size: Size, rounds: int) -> None:
    costs = costs_in_turn(ways(size, with_worst=size != MSMT17), rounds)
    num_queries, num_gallery, num_features = size
    flops = 2 * num_queries * num_gallery * num_features
    num_blocks = len(query_blocks(num_queries, num_gallery))
    table(
        f"{name}: Q = {num_queries:,}, G = {num_gallery:,}, D = {num_features:,}, "
        f"median of {rounds}; the product 2 Q G D = "
        f"{flops / 1e12:.3g} TFLOP in {num_blocks} blocks, each of which reads the gallery's "
        f"{4 * num_gallery * num_features / 1e9:.3g} GB; all Q x G distances in float32 would be "
        f"{4 * num_queries * num_gallery / 1e9:.3g} GB",
        ["way", "CPU s", "to the product", "s", "to the product", "GB above", "TFLOP/s of the product"],
        [row(way, cost, costs["product (limit)"], flops) for way, cost in costs.items()],
    )


def row(way: str, cost: Cost, limit: Cost, flops: float) -> list[object]:
    ratios = cost.cpu / limit.cpu, cost.seconds / limit.seconds
    return [way, cost.cpu, ratios[0], cost.seconds, ratios[1], cost.memory, flops / cost.seconds / 1e12]


def memory_law(sizes: tuple[int, ...]) -> None:
    rows: list[list[object]] = []
    for num_gallery in sizes:
        drawn = draw(LAW_QUERIES + num_gallery, LAW_FEATURES, device())
        limit = cost_of(partial(product, drawn.embedding[:LAW_QUERIES], drawn.embedding[LAW_QUERIES:]))
        cost = cost_of(partial(evaluation, drawn, LAW_QUERIES, "euclidean"))
        rows.append([num_gallery, cost.memory, 4 * num_gallery * LAW_FEATURES / 1e9, cost.cpu, cost.cpu / limit.cpu])
    table(
        f"Memory by the size of the gallery, {LAW_QUERIES} queries, D = {LAW_FEATURES}",
        ["G", "GB above", "the gallery's features, GB", "CPU s", "to the product"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of Market-1501, seconds")
    parser.add_argument("--threads", type=int, default=1, help="waiting threads count as CPU seconds on busy machines")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds in the medians")
    parser.add_argument("--no-msmt17", action="store_true", help="leave out MSMT17 (ten minutes on one core)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print_line(f"evaluation.py --threads {arguments.threads}: {machine()}")
    if arguments.quick:
        speed("A tenth of Market-1501", QUICK, arguments.rounds)
        memory_law(LAW[:2])
        return
    speed("Market-1501", MARKET, arguments.rounds)
    if not arguments.no_msmt17:
        speed("MSMT17", MSMT17, 1)
    memory_law(LAW)


if __name__ == "__main__":
    main()
