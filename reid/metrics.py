"""CMC, mAP, mINP and TPR at FPR from embeddings or distances, exact, in blocks of queries, without sorting; pure.

The protocol of Market-1501 as reid-strong-baseline computes it: gallery images of the query's identity on the query's
own camera are left out; a query without any other match is not valid and counts nowhere, but for its pairs in TPR at
FPR; distractors stay as negatives; AP is the mean precision at the matches (not interpolated). Among gallery images at
equal distance the one that stands first comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from reid.ranking import QueryScores, concatenate, rank_matches
from reid.single_shot import NUM_REPEATS, single_shot_positions
from reid.verification import count_digits, no_counts, num_digits, ordered_keys, tpr_at_fpr

# Queries are ranked in blocks of a fixed size, so that the matrix product of a query never depends on how queries are
# shared out; fewer where the gallery is large, so that a block's distances take 67 MB at most (and all else five times
# that).
QUERY_BLOCK, BLOCK_ELEMENTS = 256, 2**24


class NoMatchError(ValueError):
    """No query has a match."""


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the valid queries, as fractions."""

    mAP: float
    mINP: float
    cmc: Tensor  # float64 [max_rank]; entry k - 1 is rank-k
    num_valid_queries: int
    num_queries: int
    per_query: QueryScores
    tpr_at_fpr: Mapping[float, float] = field(default_factory=dict)  # over all pairs that the protocol keeps

    def summary(self) -> dict[str, float]:
        """mAP, mINP, rank-1, rank-5, rank-10, TPR at FPR and the numbers of queries, by the keys of result.json."""
        ranks = {f"rank-{k}": float(self.cmc[k - 1]) for k in (1, 5, 10) if k <= len(self.cmc)}
        rates = {f"TPR@FPR={fpr!r}": tpr for fpr, tpr in self.tpr_at_fpr.items()}
        counts = {"num_valid_queries": self.num_valid_queries, "num_queries": self.num_queries}
        return {"mAP": self.mAP, "mINP": self.mINP, **ranks, **rates, **counts}


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
    fprs: Sequence[float] = (),
    single_gallery_shot: bool = False,
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
        fprs: the false positive rates, from 0 to less than 1, at which TPR is wanted, see `reid.verification`.
        single_gallery_shot: the CMC curve is that of one image of each identity, see `reid.single_shot`; all else
            stays over the whole gallery.

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
    distances = embedding_distances(q, g, distance)
    return score(distances, query, gallery, max_rank=max_rank, fprs=fprs, single_gallery_shot=single_gallery_shot)


def scores_from_distmat(
    distmat: ArrayLike | Tensor,
    q_pids: ArrayLike | Tensor,
    q_camids: ArrayLike | Tensor,
    g_pids: ArrayLike | Tensor,
    g_camids: ArrayLike | Tensor,
    *,
    max_rank: int = 50,
    fprs: Sequence[float] = (),
    single_gallery_shot: bool = False,
) -> RetrievalScores:
    """The same from a distance matrix [Q, G], where smaller is closer; see `retrieval_scores`."""
    matrix = _as_tensor(distmat)
    if matrix.dtype != torch.float32:
        matrix = matrix.double()
    device = matrix.device
    query, gallery = Labels.of(q_pids, q_camids).to(device), Labels.of(g_pids, g_camids).to(device)
    if matrix.shape != (len(query.pids), len(gallery.pids)):
        raise ValueError(f"distmat must be [Q, G] = {[len(query.pids), len(gallery.pids)]}, got {list(matrix.shape)}")
    if matrix.isnan().any():
        raise ValueError("distmat must not hold NaN")
    distances = Distances(lambda block: matrix[block], matrix.new_zeros(len(matrix)))
    return score(distances, query, gallery, max_rank=max_rank, fprs=fprs, single_gallery_shot=single_gallery_shot)


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


@dataclass(frozen=True)
class Distances:
    """Distances of Q queries to the gallery, computed a block of queries at a time.

    Attributes:
        of_block: from a block of queries to [b, G], the same whenever it is asked; comparable within a row.
        offset: [Q]; added to their rows, the distances of different queries are comparable too.
    """

    of_block: Callable[[slice], Tensor]
    offset: Tensor


def query_blocks(num_queries: int, num_gallery: int) -> Iterator[slice]:
    """The blocks of queries that are ranked together."""
    size = min(QUERY_BLOCK, max(1, BLOCK_ELEMENTS // max(1, num_gallery)))
    for start in range(0, num_queries, size):
        yield slice(start, min(start + size, num_queries))


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


def embedding_distances(
    q_embedding: Tensor, g_embedding: Tensor, distance: Literal["cosine", "euclidean"]
) -> Distances:
    """Negative cosines or squared Euclidean distances, of embeddings as `prepare_embeddings` gives them.

    The squared length of a query is its offset: it does not change its ranking, but would round it.
    """
    if distance == "cosine":
        return Distances(lambda block: -q_embedding[block] @ g_embedding.T, q_embedding.new_zeros(len(q_embedding)))
    squared_lengths = g_embedding.square().sum(1)
    return Distances(
        lambda block: torch.addmm(squared_lengths, q_embedding[block], g_embedding.T, alpha=-2),
        q_embedding.square().sum(1),
    )


def score(
    distances: Distances,
    query: Labels,
    gallery: Labels,
    *,
    blocks: Sequence[slice] | None = None,
    gather: Callable[[QueryScores], QueryScores] = lambda own: own,
    add_up: Callable[[Tensor], Tensor] = lambda own: own,
    max_rank: int = 50,
    fprs: Sequence[float] = (),
    single_gallery_shot: bool = False,
) -> RetrievalScores:
    """Scores of all queries, of which some blocks may be ranked elsewhere.

    Args:
        distances: on the device of the labels.
        query: of Q images.
        gallery: of G images.
        blocks: the ones of `query_blocks` to rank here; None: all of them.
        gather: from the scores of these blocks to those of all queries.
        add_up: from counts of the pairs of these blocks to those of all pairs.
        max_rank: as in `retrieval_scores`.
        fprs: as in `retrieval_scores`.
        single_gallery_shot: as in `retrieval_scores`.

    Raises:
        NoMatchError: no query is valid.
        ValueError: a rate is not one.
    """
    blocks = list(query_blocks(len(query.pids), len(gallery.pids))) if blocks is None else blocks
    pair_counts = no_counts(1, distances.offset.device)
    parts = []
    for block in blocks:
        rows = distances.of_block(block)
        same_pid, is_match = _pairs(query.take(block), gallery)
        part = rank_matches(rows, same_pid, is_match)
        if single_gallery_shot:
            query_ids = np.arange(block.start, block.stop)
            positions = single_shot_positions(rows, is_match, query.pids[block], query_ids, gallery.pids)
            part = replace(part, single_shot=positions)
        if fprs:
            pair_counts += count_digits(_keys(rows, distances, block), same_pid, is_match, 0, [0])
        parts.append(part)
    scores = gather(concatenate(parts, NUM_REPEATS if single_gallery_shot else 0))

    def count(level: int, prefixes: Sequence[int]) -> Tensor:
        own = pair_counts if level == 0 else _count_pairs(distances, query, gallery, blocks, level, prefixes)
        return add_up(own)

    means = summarise(scores, max_rank=max_rank)
    return replace(means, tpr_at_fpr=tpr_at_fpr(count, fprs, num_digits(distances.offset.dtype))) if fprs else means


def _count_pairs(
    distances: Distances, query: Labels, gallery: Labels, blocks: Sequence[slice], level: int, prefixes: Sequence[int]
) -> Tensor:
    counts = no_counts(len(prefixes), distances.offset.device)
    for block in blocks:
        keys = _keys(distances.of_block(block), distances, block)
        counts += count_digits(keys, *_pairs(query.take(block), gallery), level, prefixes)
    return counts


def _keys(rows: Tensor, distances: Distances, block: slice) -> Tensor:
    return ordered_keys(rows + distances.offset[block, None])


def _pairs(query: Labels, gallery: Labels) -> tuple[Tensor, Tensor]:
    """Which pairs are of one identity, and which of them on different cameras, matches: bool [b, G] each."""
    same_pid = query.pids[:, None] == gallery.pids
    return same_pid, same_pid & (query.camids[:, None] != gallery.camids)


def summarise(scores: QueryScores, *, max_rank: int = 50) -> RetrievalScores:
    """Means over the valid queries.

    Raises:
        NoMatchError: no query is valid.
    """
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, got {max_rank}")
    is_valid = scores.is_valid
    num_valid = int(is_valid.sum())
    if num_valid == 0:
        raise NoMatchError(
            f"none of {len(is_valid)} queries has an image of its identity on another camera in the gallery"
        )
    positions = scores.cmc_positions[is_valid]  # [num_valid, R]
    hits = torch.bincount(positions[positions < max_rank], minlength=max_rank)
    return RetrievalScores(
        mAP=float(scores.average_precision[is_valid].mean()),
        mINP=float(scores.inverse_negative_penalty[is_valid].mean()),
        cmc=hits.cumsum(0).double() / positions.numel(),
        num_valid_queries=num_valid,
        num_queries=len(is_valid),
        per_query=scores,
    )
