"""CMC, mAP and mINP from embeddings or distances, exact, in blocks of queries, without sorting a distance matrix; pure.

The protocol of Market-1501 as reid-strong-baseline computes it: gallery images of the query's identity on the query's
own camera are left out; a query without any other match is not valid and counts nowhere; distractors stay as negatives;
AP is the mean precision at the matches (not interpolated). Among gallery images at equal distance the one that stands
first comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

# Queries are ranked in blocks of a fixed size, so that the matrix product of a query never depends on how queries are
# shared out.
QUERY_BLOCK = 256


@dataclass(frozen=True)
class QueryScores:
    """What each of Q queries contributes; NaN and -1 where it is not valid."""

    average_precision: Tensor  # float64 [Q]
    inverse_negative_penalty: Tensor  # float64 [Q] matches / position of the last match
    first_match: Tensor  # int64 [Q] position of the first match, from 0


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the valid queries, as fractions."""

    mAP: float
    mINP: float
    cmc: Tensor  # float64 [max_rank]; entry k - 1 is rank-k
    num_valid_queries: int
    num_queries: int
    per_query: QueryScores

    def summary(self) -> dict[str, float]:
        """mAP, mINP, rank-1, rank-5, rank-10 and the numbers of queries, by the keys of result.json."""
        ranks = {f"rank-{k}": float(self.cmc[k - 1]) for k in (1, 5, 10) if k <= len(self.cmc)}
        counts = {"num_valid_queries": self.num_valid_queries, "num_queries": self.num_queries}
        return {"mAP": self.mAP, "mINP": self.mINP, **ranks, **counts}


def retrieval_scores(
    q_embedding: ArrayLike | Tensor,
    q_pids: ArrayLike | Tensor,
    q_camids: ArrayLike | Tensor,
    g_embedding: ArrayLike | Tensor,
    g_pids: ArrayLike | Tensor,
    g_camids: ArrayLike | Tensor,
    *,
    distance: Literal["cosine", "euclidean"] = "cosine",
    max_rank: int = 50,
) -> RetrievalScores:
    """Ranks the gallery for every query by the distance of embeddings.

    Args:
        q_embedding: [Q, D].
        q_pids: [Q].
        q_camids: [Q].
        g_embedding: [G, D].
        g_pids: [G].
        g_camids: [G].
        distance: "cosine" compares directions only.
        max_rank: length of the CMC curve; beyond the gallery's size the curve stays at its last value.

    Raises:
        ValueError: no query has a match, shapes disagree, an embedding is not finite, or the distance is unknown.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f"distance must be cosine or euclidean, got {distance!r}")
    given = _as_tensor(q_embedding), _as_tensor(g_embedding)
    device = given[1].device
    query, gallery = Labels.of(q_pids, q_camids).to(device), Labels.of(g_pids, g_camids).to(device)
    dtype = torch.promote_types(given[0].dtype, given[1].dtype)
    q, g = (prepare_embeddings(embedding.to(dtype), distance) for embedding in given)
    if (len(q), len(g)) != (len(query.pids), len(gallery.pids)) or q.shape[1] != g.shape[1]:
        raise ValueError(
            f"embeddings must be [Q, D] and [G, D] with Q = {len(query.pids)} and G = {len(gallery.pids)} pids, "
            f"got {list(q.shape)} and {list(g.shape)}"
        )
    parts = [score_block(q, g, query, gallery, block, distance=distance) for block in query_blocks(len(q))]
    return summarise(concatenate(parts), max_rank=max_rank)


def scores_from_distmat(
    distmat: ArrayLike | Tensor,
    q_pids: ArrayLike | Tensor,
    q_camids: ArrayLike | Tensor,
    g_pids: ArrayLike | Tensor,
    g_camids: ArrayLike | Tensor,
    *,
    max_rank: int = 50,
) -> RetrievalScores:
    """The same from a distance matrix [Q, G], where smaller is closer; see `retrieval_scores`."""
    distances = _as_tensor(distmat)
    if not distances.is_floating_point():
        distances = distances.double()
    device = distances.device
    query, gallery = Labels.of(q_pids, q_camids).to(device), Labels.of(g_pids, g_camids).to(device)
    if distances.shape != (len(query.pids), len(gallery.pids)):
        raise ValueError(
            f"distmat must be [Q, G] = {[len(query.pids), len(gallery.pids)]}, got {list(distances.shape)}"
        )
    if distances.isnan().any():
        raise ValueError("distmat must not hold NaN")
    parts = [rank_matches(distances[block], query.take(block), gallery) for block in query_blocks(len(distances))]
    return summarise(concatenate(parts), max_rank=max_rank)


def _as_tensor(values: ArrayLike | Tensor) -> Tensor:
    """The values; copied where torch cannot share them, as views with a negative stride."""
    return values if isinstance(values, Tensor) else torch.as_tensor(np.ascontiguousarray(values))


@dataclass(frozen=True)
class Labels:
    """Identity and camera of N images."""

    pids: Tensor  # int64 [N]
    camids: Tensor  # int64 [N]

    @classmethod
    def of(cls, pids: ArrayLike | Tensor, camids: ArrayLike | Tensor) -> Labels:
        labels = cls(_as_tensor(pids), _as_tensor(camids))
        if labels.pids.dim() != 1 or labels.pids.shape != labels.camids.shape:
            raise ValueError(
                "pids and camids must be of one length and dimension, got shapes "
                f"{list(labels.pids.shape)} and {list(labels.camids.shape)}"
            )
        return labels

    def take(self, part: slice) -> Labels:
        return Labels(self.pids[part], self.camids[part])

    def to(self, device: torch.device) -> Labels:
        return Labels(self.pids.to(device), self.camids.to(device))


def query_blocks(num_queries: int) -> Iterator[slice]:
    """The blocks of queries that are ranked together."""
    for start in range(0, num_queries, QUERY_BLOCK):
        yield slice(start, min(start + QUERY_BLOCK, num_queries))


def prepare_embeddings(embedding: Tensor, distance: Literal["cosine", "euclidean"]) -> Tensor:
    """Floating, finite, and for the cosine distance of length 1: [N, D].

    Raises:
        ValueError: it is not two-dimensional, or a squared length is not finite.
    """
    if embedding.dim() != 2:
        raise ValueError(f"embeddings must be [N, D], got shape {list(embedding.shape)}")
    if embedding.dtype != torch.float64:
        embedding = embedding.float()
    if not embedding.square().sum(1).isfinite().all():  # nor NaN nor so large that distances would overflow
        raise ValueError("embeddings and their squared lengths must be finite, got NaN or infinity")
    return F.normalize(embedding) if distance == "cosine" else embedding


def score_block(
    q_embedding: Tensor,
    g_embedding: Tensor,
    query: Labels,
    gallery: Labels,
    block: slice,
    *,
    distance: Literal["cosine", "euclidean"],
) -> QueryScores:
    """Scores of one block of queries; embeddings as `prepare_embeddings` gives them, all on one device.

    The distances are shifted by a constant of each query (its squared length), which does not change its ranking.
    """
    own = q_embedding[block]
    if distance == "cosine":
        distances = -own @ g_embedding.T
    else:
        distances = torch.addmm(g_embedding.square().sum(1), own, g_embedding.T, alpha=-2)
    return rank_matches(distances, query.take(block), gallery)


def rank_matches(distances: Tensor, query: Labels, gallery: Labels) -> QueryScores:
    """Finds the position of every match by counting what is closer.

    Args:
        distances: [b, G].
        query: of the b queries.
        gallery: of the G gallery images.
    """
    same_pid = query.pids[:, None] == gallery.pids  # [b, G]
    left_out = same_pid & (query.camids[:, None] == gallery.camids)
    is_match = same_pid & ~left_out
    distances = distances.masked_fill(left_out, torch.inf)
    num_matches = is_match.sum(1)  # [b]
    matched = _matched_distances(distances, is_match, num_matches)  # [b, M]
    positions, has_ties = _positions(distances, matched, is_match)
    for row in has_ties.nonzero()[:, 0].tolist():
        kept = (~left_out[row]).nonzero()[:, 0]
        order = distances[row, kept].argsort(stable=True)
        positions[row, : int(num_matches[row])] = is_match[row, kept][order].nonzero()[:, 0]
    return _scores_from_positions(positions, num_matches)


def _matched_distances(distances: Tensor, is_match: Tensor, num_matches: Tensor) -> Tensor:
    """The distances of each query's matches, ascending, filled up with infinity: [b, M]."""
    rows, columns = is_match.nonzero(as_tuple=True)  # row by row
    starts = num_matches.cumsum(0) - num_matches
    places = torch.arange(len(rows), device=rows.device) - starts[rows]
    width = max(int(num_matches.max()), 1) if len(num_matches) else 1
    matched = distances.new_full((len(distances), width), torch.inf)
    matched[rows, places] = distances[rows, columns]
    return matched.sort(dim=1).values


def _positions(distances: Tensor, matched: Tensor, is_match: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [b, M] of the matches, from 0; and the queries [b] where they are not settled, as other images tie."""
    num_queries, width = matched.shape
    # An image is closer than the matches from number `closer_than` on.
    closer_than = torch.searchsorted(matched, distances, right=True)  # [b, G]
    equals_a_match = matched.gather(1, (closer_than - 1).clamp(min=0)) == distances
    at_infinity = distances == torch.inf  # what is left out, or an infinite distance given by the caller
    has_ties = ((equals_a_match & ~at_infinity & ~is_match) | (is_match & at_infinity)).any(1)
    offsets = torch.arange(num_queries, device=distances.device)[:, None] * (width + 1)
    counts = torch.bincount((closer_than + offsets).flatten(), minlength=num_queries * (width + 1))
    num_closer = counts.view(num_queries, width + 1).cumsum(1)[:, :width]
    # Matches at equal distance follow each other.
    first_equal = torch.searchsorted(matched, matched)
    return num_closer + torch.arange(width, device=matched.device) - first_equal, has_ties


def _scores_from_positions(positions: Tensor, num_matches: Tensor) -> QueryScores:
    number = torch.arange(1, positions.shape[1] + 1, device=positions.device)  # [M]
    is_real = number <= num_matches[:, None]
    precision = (number / (positions + 1).double()).masked_fill(~is_real, 0)
    is_valid = num_matches > 0
    last = positions.gather(1, (num_matches - 1).clamp(min=0)[:, None])[:, 0]
    return QueryScores(
        average_precision=(precision.sum(1) / num_matches).masked_fill(~is_valid, torch.nan),
        inverse_negative_penalty=(num_matches / (last + 1).double()).masked_fill(~is_valid, torch.nan),
        first_match=positions[:, 0].masked_fill(~is_valid, -1),
    )


def concatenate(parts: list[QueryScores]) -> QueryScores:
    """The scores of consecutive blocks as one."""
    if not parts:
        nothing = torch.zeros(0, dtype=torch.float64)
        return QueryScores(nothing, nothing, nothing.long())
    return QueryScores(
        torch.cat([part.average_precision for part in parts]),
        torch.cat([part.inverse_negative_penalty for part in parts]),
        torch.cat([part.first_match for part in parts]),
    )


def summarise(scores: QueryScores, *, max_rank: int = 50) -> RetrievalScores:
    """Means over the valid queries.

    Raises:
        ValueError: no query is valid.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    is_valid = scores.first_match >= 0
    num_valid = int(is_valid.sum())
    if num_valid == 0:
        raise ValueError(
            f"none of {len(is_valid)} queries has an image of its identity on another camera in the gallery"
        )
    first = scores.first_match[is_valid]
    hits = torch.bincount(first[first < max_rank], minlength=max_rank)
    return RetrievalScores(
        mAP=float(scores.average_precision[is_valid].mean()),
        mINP=float(scores.inverse_negative_penalty[is_valid].mean()),
        cmc=hits.cumsum(0).double() / num_valid,
        num_valid_queries=num_valid,
        num_queries=len(is_valid),
        per_query=scores,
    )
