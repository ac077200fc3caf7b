"""Selected queries and the first images of their rankings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from reid.randomness import random_bits
from reid.retrieval.distances import Distances
from reid.retrieval.metrics import Labels, query_blocks
from reid.retrieval.ranking import QueryScores

_EXAMPLES = 48  # separates these random numbers from all others (see data/augment.py)


@dataclass(frozen=True)
class Example:
    """A query and the first images of its ranking.

    Attributes:
        query: Index of the query.
        gallery: Indices of the k nearest gallery images that the protocol keeps, nearest first.
        distances: Distances of these images, comparable over queries.
        is_match: Whether each of these images is of the query's identity.
    """

    query: int
    gallery: list[int]
    distances: list[float]
    is_match: list[bool]


def seeded_queries(scores: QueryScores, num: int, seed: int) -> list[int]:
    """Return random queries with a match in ascending order; they are equal for every model."""
    valid = np.flatnonzero(scores.first_match.cpu().numpy() >= 0)
    keys = random_bits(seed, _EXAMPLES, valid)
    return sorted(valid[np.argsort(keys, kind="stable")[:num]].tolist())


def worst_queries(scores: QueryScores, num: int) -> list[int]:
    """Return the queries with the lowest AP, worst first; queries of equal AP are in their order."""
    valid = np.flatnonzero(scores.first_match.cpu().numpy() >= 0)
    precision = scores.average_precision.cpu().numpy()[valid]
    worst: list[int] = valid[np.argsort(precision, kind="stable")[:num]].tolist()
    return worst


def find_examples(
    queries: Sequence[int], distances: Distances, query: Labels, gallery: Labels, num: int = 10
) -> list[Example]:
    """Return the first images of the rankings of some queries.

    Distances are computed for the complete block in which the query was scored, so that they are equal bit for bit.
    Images at equal distance are in gallery order.

    Args:
        queries: Indices of the queries.
        distances: Distances of all queries.
        query: Labels of all queries.
        gallery: Labels of all gallery images.
        num: Largest number k of images for each query.
    """
    device = distances.offset.device
    query, gallery = query.to(device), gallery.to(device)
    examples = {}
    for block in query_blocks(len(query.pids), len(gallery.pids)):
        inside = [number for number in queries if block.start <= number < block.stop]
        if not inside:
            continue
        rows = distances.of_block(block)
        for number in inside:
            row, offset = rows[number - block.start], distances.offset[number]
            examples[number] = _example(number, row, offset, query, gallery, num)
    return [examples[number] for number in queries]


def _example(number: int, row: Tensor, offset: Tensor, query: Labels, gallery: Labels, num: int) -> Example:
    same_pid = gallery.pids == query.pids[number]
    kept = (~(same_pid & (gallery.camids == query.camids[number]))).nonzero()[:, 0]
    closest = kept[row[kept].argsort(stable=True)[:num]]
    return Example(
        query=number,
        gallery=closest.tolist(),
        distances=(row[closest] + offset).tolist(),
        is_match=same_pid[closest].tolist(),
    )


def query_table(scores: QueryScores, query: Labels, names: Sequence[str]) -> tuple[list[str], list[list[object]]]:
    """Return columns and rows of a table of the queries with a match, lowest AP first.

    Args:
        scores: Scores of Q queries.
        query: Labels of the queries.
        names: File names of the queries.
    """
    columns = ["query", "pid", "camid", "AP", "INP", "first_match_rank"]
    order = worst_queries(scores, len(names))
    values = zip(
        [names[number] for number in order],
        query.pids[order].tolist(),
        query.camids[order].tolist(),
        scores.average_precision[order].tolist(),
        scores.inverse_negative_penalty[order].tolist(),
        (scores.first_match[order] + 1).tolist(),
        strict=True,
    )
    return columns, [list(row) for row in values]
