"""CMC, mAP, mINP and TPR at FPR of a retrieval, exact, from embeddings or distances, in blocks of queries.

The protocol is that of Market-1501 as reid-strong-baseline computes it. Gallery images of the query's identity on the
query's own camera are left out. A query without any other match is not valid and counts nowhere, except for its
negative pairs in TPR at FPR. Distractors stay as negatives. AP is the mean precision at the matches, not interpolated.
Gallery images at equal distance are ranked in gallery order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from reid.retrieval.distances import Distance, Distances, as_tensor, embedding_distances, prepare_pair
from reid.retrieval.ranking import QueryScores, concatenate, rank_matches
from reid.retrieval.roc import NUM_BINS, count_pairs, num_levels, ordered_keys, tpr_at_fpr
from reid.retrieval.single_gallery_shot import NUM_REPEATS, single_shot_positions

# A block has a fixed number of queries, so that a query's matrix product does not depend on the number of ranks. It has
# fewer for a large gallery: the distances of a block take at most 67 MB, and everything else five times as much.
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
    tpr_at_fpr: Mapping[float, float] = field(default_factory=dict)  # by FPR, over all pairs that the protocol keeps

    def summary(self) -> dict[str, float]:
        """Return mAP, mINP, rank-1, rank-5, rank-10, TPR at FPR and numbers of queries by the keys of result.json."""
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
    distance: Distance = "cosine",
    max_rank: int = 50,
    fprs: Sequence[float] = (),
    single_gallery_shot: bool = False,
) -> RetrievalScores:
    """Rank the gallery for every query by the distance of embeddings, and score the rankings.

    All arguments may be tensors, numpy arrays or lists.

    Args:
        q_embedding: [Q, D] embeddings of the queries.
        q_pids: [Q] identities of the queries.
        q_camids: [Q] cameras of the queries.
        g_embedding: [G, D] embeddings of the gallery.
        g_pids: [G] identities of the gallery.
        g_camids: [G] cameras of the gallery.
        distance: "cosine" (embeddings of any length) or "euclidean".
        max_rank: Length of the CMC curve; beyond the gallery's size it stays at its last value.
        fprs: False positive rates, from 0 to less than 1, at which TPR is computed, see `reid.retrieval.roc`.
        single_gallery_shot: Compute the CMC curve against one image of each identity, as
            `reid.retrieval.single_gallery_shot` does.

    Returns:
        Scores with `mAP`, `mINP`, `cmc` (float64 [max_rank]) and `num_valid_queries`; fractions, not percentages.

    Raises:
        ValueError: No query has a match (`NoMatchError`), shapes disagree, an embedding is not finite, or an option is
            out of range.

    Source: Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015; mINP: Ye et al., Deep Learning for
        Person Re-identification: A Survey and Outlook, arXiv 2001.04193.

    Example:
        >>> scores = retrieval_scores([[1, 0]], [7], [0], [[0, 1], [2, 1]], [8, 7], [1, 1])
        >>> scores.mAP, scores.cmc[0].item(), scores.num_valid_queries
        (1.0, 1.0, 1)
    """
    q, g = prepare_pair(q_embedding, g_embedding, distance)
    query, gallery = Labels.of(q_pids, q_camids).to(g.device), Labels.of(g_pids, g_camids).to(g.device)
    if (len(q), len(g)) != (len(query.pids), len(gallery.pids)):
        raise ValueError(
            f"embeddings must be [Q, D] and [G, D] with Q = {len(query.pids)} and G = {len(gallery.pids)} pids, "
            f"got {list(q.shape)} and {list(g.shape)}"
        )
    return score(embedding_distances(q, g, distance), query, gallery, Protocol(max_rank, fprs, single_gallery_shot))


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
    """Rank the gallery for every query by given distances, and score the rankings.

    Args:
        distmat: [Q, G] distances, smaller is closer; for example those of `reid.retrieval.reranking.k_reciprocal`.
        q_pids: [Q] identities of the queries; this and all further arguments are those of `retrieval_scores`.
        q_camids: [Q] cameras of the queries.
        g_pids: [G] identities of the gallery.
        g_camids: [G] cameras of the gallery.
        max_rank: Length of the CMC curve.
        fprs: False positive rates.
        single_gallery_shot: Protocol of the CMC curve.

    Returns:
        See `retrieval_scores`.

    Raises:
        ValueError: See `retrieval_scores`, or a distance is NaN.

    Example:
        >>> scores_from_distmat([[0.2, 0.1, 0.3]], [7], [0], [7, 8, 7], [1, 1, 2]).mAP  # (1/2 + 2/3) / 2
        0.5833333333333333
    """
    matrix = as_tensor(distmat)
    if matrix.dtype != torch.float32:
        matrix = matrix.double()
    device = matrix.device
    query, gallery = Labels.of(q_pids, q_camids).to(device), Labels.of(g_pids, g_camids).to(device)
    if matrix.shape != (len(query.pids), len(gallery.pids)):
        raise ValueError(f"distmat must be [Q, G] = {[len(query.pids), len(gallery.pids)]}, got {list(matrix.shape)}")
    if matrix.isnan().any():
        raise ValueError("distmat must not hold NaN")
    distances = Distances(lambda block: matrix[block], matrix.new_zeros(len(matrix)))
    return score(distances, query, gallery, Protocol(max_rank, fprs, single_gallery_shot))


@dataclass(frozen=True)
class Labels:
    """Identity and camera of N images."""

    pids: Tensor  # int64 [N]
    camids: Tensor  # int64 [N]

    @classmethod
    def of(cls, pids: ArrayLike | Tensor, camids: ArrayLike | Tensor) -> Labels:
        labels = cls(_whole_numbers("pids", pids), _whole_numbers("camids", camids))
        if labels.pids.dim() != 1 or labels.pids.shape != labels.camids.shape:
            raise ValueError(
                "pids and camids must be of one length and dimension, got shapes "
                f"{list(labels.pids.shape)} and {list(labels.camids.shape)}"
            )
        return labels

    def to(self, device: torch.device) -> Labels:
        return Labels(self.pids.to(device), self.camids.to(device))


def _whole_numbers(name: str, values: ArrayLike | Tensor) -> Tensor:
    """Return int64 labels of any type that holds whole numbers.

    Raises:
        ValueError: There are other values, such as names or NaN.
    """
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name} must be whole numbers, got the type {array.dtype}")
        # A copy, as torch neither shares read-only arrays nor computes with most unsigned types.
        values = torch.from_numpy(np.array(array, dtype=np.float64 if array.dtype.kind == "f" else np.int64))
    labels = values.detach().to(torch.int64)
    if not torch.equal(labels.to(values.dtype), values.detach()):
        raise ValueError(f"{name} must be whole numbers, got others among {values.dtype} values")
    return labels


@dataclass(frozen=True)
class Protocol:
    """Options of the scores, see `retrieval_scores`."""

    max_rank: int = 50
    fprs: Sequence[float] = ()
    single_gallery_shot: bool = False


@dataclass(frozen=True)
class Share:
    """The part of the queries that is ranked here, where others rank the rest.

    Attributes:
        blocks: Blocks of `query_blocks` to rank here.
        gather: Function of the scores of these blocks that returns those of all queries.
        add_up: Function of the pair counts of these blocks that returns their sum over all blocks.
    """

    blocks: Sequence[slice]
    gather: Callable[[QueryScores], QueryScores] = lambda scores: scores
    add_up: Callable[[Tensor], Tensor] = lambda counts: counts


def query_blocks(num_queries: int, num_gallery: int) -> list[slice]:
    """Return the blocks of queries that are ranked together."""
    size = min(QUERY_BLOCK, max(1, BLOCK_ELEMENTS // max(1, num_gallery)))
    return [slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]


def score(
    distances: Distances,
    query: Labels,
    gallery: Labels,
    protocol: Protocol,
    share: Share | None = None,
) -> RetrievalScores:
    """Return the scores of all queries.

    Args:
        distances: Distances on the device of the labels.
        query: Labels of Q images.
        gallery: Labels of G images.
        protocol: Options of the scores.
        share: Part of the queries that is ranked here; None for all of them.

    Raises:
        NoMatchError: No query is valid.
        ValueError: An option is out of range.
    """
    share = share or Share(query_blocks(len(query.pids), len(gallery.pids)))
    first_counts = _no_pairs(1, distances)
    parts = []
    for block in share.blocks:
        rows = distances.of_block(block)
        same_pid, is_match = _pairs(query, gallery, block)
        part = rank_matches(rows, same_pid, is_match)
        if protocol.single_gallery_shot:
            query_ids = np.arange(block.start, block.stop)
            positions = single_shot_positions(rows, is_match, query.pids[block], query_ids, gallery.pids)
            part = replace(part, single_shot=positions)
        if protocol.fprs:
            first_counts += count_pairs(_keys(rows, distances, block), same_pid, is_match, 0, [0])
        parts.append(part)
    scores = share.gather(concatenate(parts, NUM_REPEATS if protocol.single_gallery_shot else 0))
    means = summarize(scores, protocol.max_rank)
    if not protocol.fprs:
        return means

    def count(level: int, prefixes: list[int]) -> Tensor:
        if level == 0:
            return share.add_up(first_counts)
        counts = _no_pairs(len(prefixes), distances)
        for block in share.blocks:
            keys = _keys(distances.of_block(block), distances, block)
            counts += count_pairs(keys, *_pairs(query, gallery, block), level, prefixes)
        return share.add_up(counts)

    return replace(means, tpr_at_fpr=tpr_at_fpr(count, protocol.fprs, num_levels(distances.offset.dtype)))


def _pairs(query: Labels, gallery: Labels, block: slice) -> tuple[Tensor, Tensor]:
    """Return which pairs of a block have one pid, and which of them match: bool [b, G] each."""
    same_pid = query.pids[block, None] == gallery.pids
    return same_pid, same_pid & (query.camids[block, None] != gallery.camids)


def _keys(rows: Tensor, distances: Distances, block: slice) -> Tensor:
    return ordered_keys(rows + distances.offset[block, None])


def _no_pairs(num_prefixes: int, distances: Distances) -> Tensor:
    return torch.zeros((num_prefixes, 2, NUM_BINS), dtype=torch.int64, device=distances.offset.device)


def summarize(scores: QueryScores, max_rank: int) -> RetrievalScores:
    """Return the means over the valid queries.

    Raises:
        NoMatchError: No query is valid.
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
