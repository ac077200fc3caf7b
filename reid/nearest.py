"""The nearest embeddings of a gallery, exact, with ties in the gallery's order; pure.

A search in float32 (by faiss or by torch) finds candidates. Their distances are computed again in float64, and a query
is settled once no other image can be among its nearest, whatever float32 has rounded. So the result depends neither on
the library, nor on its order of summation, nor on how the gallery was cut into blocks.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Distance = Literal["cosine", "euclidean"]
Floats = NDArray[np.float32]
Found = tuple[Floats, NDArray[np.int64]]  # the smallest costs of each query, and where they are: both [Q, num]

_SPARE = 16  # candidates beyond those wanted, so that one search nearly always settles it
_BLOCK = 16384  # gallery images that are compared at once
_QUERY_BLOCK = 256
_ROUNDING = 2.0**-24  # relative, of one float32 operation


def nearest(
    q_embedding: Floats,
    g_embedding: Floats,
    top: int,
    *,
    distance: Distance,
    use_faiss: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The nearest gallery images of every query, the nearest first; of equally near ones the one that stands first.

    Args:
        q_embedding: [Q, D], finite; for the cosine distance of length 1.
        g_embedding: [G, D], likewise; may be memory-mapped.
        top: k, at most G are given.
        distance: "cosine" gives 1 minus the inner product, "euclidean" the distance itself.
        use_faiss: search by faiss, which must be installed, instead of torch.

    Returns:
        Distances [Q, min(k, G)], and positions in the gallery of the same shape.
    """
    num_found = min(top, len(g_embedding))
    costs = np.zeros((len(q_embedding), num_found))
    places = np.zeros((len(q_embedding), num_found), dtype=np.int64)
    longest = max(float(np.linalg.norm(g_embedding[i : i + _BLOCK], axis=1).max()) for i in _starts(len(g_embedding)))
    open_queries, num_candidates = np.arange(len(q_embedding)), num_found + _SPARE
    while len(open_queries):
        num_candidates = min(num_candidates, len(g_embedding))
        search = _by_faiss if use_faiss else _by_torch
        coarse, candidates = search(q_embedding[open_queries], g_embedding, num_candidates, distance)
        unsettled = []
        for query, own_coarse, own in zip(open_queries, coarse, candidates, strict=True):
            cost = _exact_costs(q_embedding[query], g_embedding, own, distance)
            order = np.lexsort((own, cost))[:num_found]
            costs[query], places[query] = cost[order], own[order]
            # What is no candidate is at least this far.
            bound = float(own_coarse.max()) - _error_bound(q_embedding[query], longest, distance)
            if num_candidates < len(g_embedding) and costs[query, -1] >= bound:
                unsettled.append(query)
        open_queries, num_candidates = np.array(unsettled, dtype=np.int64), 4 * num_candidates
    return (1 + costs if distance == "cosine" else np.sqrt(costs)), places


def _exact_costs(query: Floats, gallery: Floats, places: NDArray[np.int64], distance: Distance) -> NDArray[np.float64]:
    """Minus the inner products, or the squared distances, row by row: equal images have equal costs."""
    wide = query.astype(np.float64)
    parts = []
    for start in _starts(len(places)):
        rows = gallery[places[start : start + _BLOCK]].astype(np.float64)
        parts.append(-(rows * wide).sum(axis=1) if distance == "cosine" else np.square(rows - wide).sum(axis=1))
    return np.concatenate(parts)


def _error_bound(query: Floats, longest: float, distance: Distance) -> float:
    """How far a float32 cost can be from the exact one, in any order of summation (Higham, section 3.1)."""
    length, num_terms = float(np.linalg.norm(query)), len(query) + 4
    scale = length * longest if distance == "cosine" else 2 * (length + longest) ** 2
    return 1.1 * num_terms * _ROUNDING * scale


def _by_torch(q: Floats, g: Floats, num: int, distance: Distance) -> Found:
    """Block by block of queries and of the gallery, so that memory stays bounded."""
    blocks = (torch.from_numpy(q[i : i + _QUERY_BLOCK]) for i in range(0, len(q), _QUERY_BLOCK))
    found = [_block_of_queries(block, g, num, distance) for block in blocks]
    return np.concatenate([costs for costs, _ in found]), np.concatenate([places for _, places in found])


def _block_of_queries(q: torch.Tensor, g: Floats, num: int, distance: Distance) -> Found:
    best = torch.zeros((len(q), 0))
    places = torch.zeros((len(q), 0), dtype=torch.int64)
    for start in _starts(len(g)):
        block = torch.from_numpy(np.array(g[start : start + _BLOCK]))
        costs = -q @ block.T
        if distance == "euclidean":
            costs = 2 * costs + block.square().sum(1) + q.square().sum(1, keepdim=True)
        best = torch.cat([best, costs], dim=1)
        places = torch.cat([places, torch.arange(start, start + len(block)).expand(len(q), -1)], dim=1)
        best, kept = best.topk(min(num, best.shape[1]), largest=False)
        places = places.gather(1, kept)
    return best.numpy(), places.numpy()


def _by_faiss(q: Floats, g: Floats, num: int, distance: Distance) -> Found:
    """The same by faiss's brute force, without a copy of the gallery in an index."""
    import faiss

    metric = faiss.METRIC_INNER_PRODUCT if distance == "cosine" else faiss.METRIC_L2
    costs, places = faiss.knn(q, g, num, metric=metric)
    return (-costs if distance == "cosine" else costs), places


def _starts(length: int) -> range:
    return range(0, length, _BLOCK)
