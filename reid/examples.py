"""Which queries are worth looking at, and what stands first in their rankings; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from reid.data.randomness import random_bits
from reid.metrics import Distances, Labels, query_blocks
from reid.ranking import QueryScores

_EXAMPLES = 48  # a number of its own, so that no other purpose shares these random numbers (see data/augment.py)


@dataclass(frozen=True)
class Example:
    """A query and the head of its ranking, as the scores see it.

    Attributes:
        query: its position among the queries.
        gallery: positions of the k closest gallery images that the protocol keeps, the closest first.
        distances: of them, comparable over queries.
        is_match: whether they are of the query's identity.
    """

    query: int
    gallery: list[int]
    distances: list[float]
    is_match: list[bool]


def seeded_queries(scores: QueryScores, num: int, seed: int) -> list[int]:
    """Random queries with a match, ascending; the same for any model."""
    valid = np.flatnonzero(scores.first_match.cpu().numpy() >= 0)
    keys = random_bits(seed, _EXAMPLES, valid)
    return sorted(valid[np.argsort(keys, kind="stable")[:num]].tolist())


def worst_queries(scores: QueryScores, num: int) -> list[int]:
    """The queries of the lowest AP, the worst first, of equals the one that stands first."""
    valid = np.flatnonzero(scores.first_match.cpu().numpy() >= 0)
    precision = scores.average_precision.cpu().numpy()[valid]
    found: list[int] = valid[np.argsort(precision, kind="stable")[:num]].tolist()
    return found


def find_examples(
    queries: Sequence[int], distances: Distances, query: Labels, gallery: Labels, num: int = 10
) -> list[Example]:
    """What stands first in the rankings of these queries.

    A query's distances are computed with the whole block that it was scored in, so that they are the same to the bit;
    of equals the image that stands first comes first.

    Args:
        queries: positions among the queries.
        distances: of all queries.
        query: of all of them.
        gallery: of all images.
        num: k, the most to find for each.
    """
    device = distances.offset.device
    query, gallery = query.to(device), gallery.to(device)
    found = {}
    for block in query_blocks(len(query.pids), len(gallery.pids)):
        inside = [number for number in queries if block.start <= number < block.stop]
        if not inside:
            continue
        rows = distances.of_block(block)
        for number in inside:
            row, offset = rows[number - block.start], distances.offset[number]
            found[number] = _example(number, row, offset, query, gallery, num)
    return [found[number] for number in queries]


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
    """Columns and rows of a table of the queries with a match, the lowest AP first.

    Args:
        scores: of Q queries.
        query: pids and camids of them.
        names: of their files.
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
