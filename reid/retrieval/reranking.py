"""k-reciprocal re-ranking, exact and sparse, in memory linear in the number of images.

The published algorithm on squared Euclidean distances, as reid-strong-baseline runs it, except that nothing is rounded
to half precision and that images at equal distance are in the order of their positions. The N images are the Q queries
followed by the G gallery images. No N x N matrix is built. Weights are integers in units of 2**-40, so that their sums
do not depend on the order of summation, and any number of ranks gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from reid.retrieval.distances import prepare_pair
from reid.retrieval.neighbours import Points, nearest, pair_distances, row_blocks, squared_distances
from reid.retrieval.sparse_rows import SparseRows, concatenate, portions, ragged_ranges

ONE = 2**40  # the weight 1; sums over k2 rows stay below 2**63 up to k2 = 2**22

Gather = Callable[[Tensor, Tensor, int], Tensor]


def k_reciprocal(
    q_embedding: ArrayLike | Tensor,
    g_embedding: ArrayLike | Tensor,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Tensor:
    """Return re-ranked distances of queries to gallery images, by the k-reciprocal neighbors that they share.

    Embeddings may be tensors, numpy arrays or lists.

    Args:
        q_embedding: [Q, D] embeddings of the queries; give rows of length 1 to compare directions only.
        g_embedding: [G, D] embeddings of the gallery.
        k1: Number of nearest images, besides the image itself, that must be mutual; all where there are fewer.
        k2: Number of nearest images, the image itself included, whose weights are averaged; 1 for no averaging.
        lambda_value: Share of the original distance, 0 to 1.

    Returns:
        distmat [Q, G], smaller is closer; float64 if an embedding is float64, else float32.

    Raises:
        ValueError: An argument is out of range, an embedding is not finite, shapes disagree, or a size is 0.

    Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017.

    Example:
        >>> distmat = k_reciprocal([[1.0, 0.0]], [[0.0, 1.0], [0.9, 0.1]], k1=1, k2=1)
        >>> distmat.argmin().item()
        1
    """
    reranked = KReciprocal(q_embedding, g_embedding, k1, k2, lambda_value)
    return reranked.distances(slice(0, reranked.num_queries))


class KReciprocal:
    """Re-ranked distances, one block of queries at a time; see `k_reciprocal`.

    Ranks may share the work. Each one passes all embeddings, its blocks, and a collective `gather`.

    Args:
        q_embedding: [Q, D].
        g_embedding: [G, D].
        k1: See `k_reciprocal`.
        k2: See `k_reciprocal`.
        lambda_value: See `k_reciprocal`.
        blocks: This rank's part of `neighbours.row_blocks(Q + G)`, possibly empty; None for all blocks.
        gather: Function of rows [n, ...], their positions [n] and the number of rows over all ranks that returns the
            rows of all ranks in order.

    Raises:
        ValueError: See `k_reciprocal`.
    """

    def __init__(
        self,
        q_embedding: ArrayLike | Tensor,
        g_embedding: ArrayLike | Tensor,
        k1: int,
        k2: int,
        lambda_value: float,
        *,
        blocks: Sequence[slice] | None = None,
        gather: Gather = lambda rows, positions, num_rows: rows,
    ) -> None:
        _validate_parameters(k1, k2, lambda_value)
        points, self.num_queries = _stack_points(q_embedding, g_embedding)
        blocks = row_blocks(len(points)) if blocks is None else blocks
        num_mutual = min(k1 + 1, len(points))
        num_half = min(round(k1 / 2) + 1, len(points))  # rounds halves to even, as numpy.around does
        num_averaged = min(k2, len(points))

        num_nearest, none = max(num_mutual, num_averaged), torch.zeros_like(points.squared_norm[:0], dtype=torch.int64)
        local = [nearest(points, block, num_nearest) for block in blocks]
        # A rank without a block takes part in every collective with no rows.
        positions = torch.cat([none, *(torch.arange(b.start, b.stop, device=none.device) for b in blocks)])
        neighbors = torch.cat([none.view(0, num_nearest), *(ids for ids, _ in local)])
        neighbors = gather(neighbors, positions, len(points))
        farthest = torch.cat([points.squared_norm[:0], *(far for _, far in local)])
        farthest = gather(farthest, positions, len(points))
        farthest[farthest == 0] = 1  # all images are equal, and every distance is 0

        encoding = Encoding.of(points, farthest, neighbors[:, :num_mutual], neighbors[:, :num_half])
        weights = _gather_rows([encoding.weights(block) for block in blocks], positions, len(points), gather)
        if num_averaged > 1:
            summed = [weights.summed(neighbors[block, :num_averaged]) for block in blocks]
            weights = _gather_rows(summed, positions, len(points), gather)
        self._points, self._farthest, self._lambda = points, farthest, lambda_value
        self._weights, self._total = weights, ONE * num_averaged
        self._holders = weights.part(slice(self.num_queries, len(points))).transposed(len(points))

    def distances(self, block: slice) -> Tensor:
        """Return the re-ranked distances of a block of queries to the gallery: [b, G]."""
        gallery = self._points.part(slice(self.num_queries, len(self._points)))
        distmat = squared_distances(self._points.part(block), gallery)
        distmat *= self._lambda / self._farthest[block, None]
        distmat += 1 - self._lambda  # the Jaccard distance is 1 where no neighbor is shared
        weights = self._weights.part(block)
        for portion in portions(weights.num_common(self._holders) + len(gallery)):
            common = weights.part(portion).common(self._holders, len(gallery)).double() / self._total  # [b', G]
            distmat[portion] -= (1 - self._lambda) * (common / (2 - common)).to(distmat.dtype)
        return distmat


def _validate_parameters(k1: int, k2: int, lambda_value: float) -> None:
    for name, value in (("k1", k1), ("k2", k2)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} of re-ranking must be an integer of at least 1, got {value!r}")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value of re-ranking must be between 0 and 1, got {lambda_value!r}")


def _stack_points(q_embedding: ArrayLike | Tensor, g_embedding: ArrayLike | Tensor) -> tuple[Points, int]:
    """Return the points of queries and gallery, and Q."""
    q, g = prepare_pair(q_embedding, g_embedding, "euclidean")
    if 0 in (*q.shape, *g.shape):
        raise ValueError(
            "embeddings must be [Q, D] and [G, D] with at least one query, gallery image and feature, got "
            f"{list(q.shape)} and {list(g.shape)}"
        )
    return Points.of(torch.cat([q, g])), len(q)


def _gather_rows(parts: Sequence[SparseRows], positions: Tensor, num_rows: int, gather: Gather) -> SparseRows:
    """Return the rows of all ranks, ordered by position."""
    local = concatenate(parts, positions.device)
    counts = gather(local.counts, positions, num_rows)
    starts, entries = counts.cumsum(0) - counts, torch.stack([local.columns, local.weights], dim=1)
    entries = gather(entries, ragged_ranges(starts[positions], local.counts), int(counts.sum()))
    return SparseRows.of(counts, entries[:, 0].contiguous(), entries[:, 1].contiguous())


# ---- k-reciprocal encoding ----


@dataclass(frozen=True)
class Encoding:
    """Neighbors and distances from which the weights of a row are computed."""

    points: Points
    farthest: Tensor  # [N] largest squared distance of each row, by which its distances are divided
    nearest: Tensor  # int64 [N, k1 + 1]
    halves: Tensor  # int64 [N, k1/2 + 1] mutual ones of the k1/2 nearest; N elsewhere

    @classmethod
    def of(cls, points: Points, farthest: Tensor, nearest: Tensor, half: Tensor) -> Encoding:
        halves = [mutual(half, portion) for portion in portions(torch.full((len(half),), half.shape[1] ** 2))]
        return cls(points, farthest, nearest, torch.cat(halves))

    def weights(self, block: slice) -> SparseRows:
        """Return the Gaussian weights of the images in the expanded k-reciprocal sets of a block of rows."""
        num_nearest, num_half = self.nearest.shape[1], self.halves.shape[1]
        costs = torch.full((block.stop - block.start,), num_nearest * (num_nearest + num_half))
        parts = [slice(block.start + part.start, block.start + part.stop) for part in portions(costs)]
        return concatenate([self._weights(part) for part in parts], self.nearest.device)

    def _weights(self, block: slice) -> SparseRows:
        sets = self._expanded_sets(block)  # [b, S]
        is_member = sets < len(self.points)
        counts, columns = is_member.sum(1), sets[is_member]
        distances = pair_distances(self.points.part(block), self.points, counts, columns)
        distances = distances.double() / self.farthest[block].repeat_interleave(counts)
        gauss = ((-distances).exp() * ONE).round().long()
        owners = torch.repeat_interleave(counts)
        totals = torch.zeros_like(counts).index_add_(0, owners, gauss)
        return SparseRows.of(counts, columns, (gauss.double() / totals[owners] * ONE).round().long())

    def _expanded_sets(self, block: slice) -> Tensor:
        """Return the k-reciprocal sets, expanded by the half sets that share more than 2/3 with them; N elsewhere."""
        none = len(self.points)
        reciprocal = mutual(self.nearest, block).sort(dim=1).values  # [b, k1 + 1]
        halves = self.halves[reciprocal.clamp(max=none - 1)]  # [b, k1 + 1, k1/2 + 1]
        flat = halves.flatten(1)
        positions = torch.searchsorted(reciprocal, flat).clamp(max=reciprocal.shape[1] - 1)
        is_half = halves < none
        is_common = (reciprocal.gather(1, positions) == flat).view_as(halves) & is_half
        is_taken = (3 * is_common.sum(2) > 2 * is_half.sum(2)) & (reciprocal < none)
        taken = halves.masked_fill(~is_taken[..., None], none)
        members = torch.cat([reciprocal, taken.flatten(1)], dim=1).sort(dim=1).values
        is_repeated = members[:, 1:] == members[:, :-1]
        members[:, 1:].masked_fill_(is_repeated, none)
        return members


def mutual(nearest: Tensor, block: slice) -> Tensor:
    """Return the nearest images of each row that also have the row among their nearest images.

    Args:
        nearest: int64 [N, k] nearest images of all rows.
        block: Rows to compute.

    Returns:
        [b, k]; N for images that are not mutual.
    """
    images = nearest[block]
    rows = torch.arange(block.start, block.stop, device=images.device)
    is_mutual = (nearest[images] == rows[:, None, None]).any(2)
    return images.masked_fill(~is_mutual, len(nearest))
