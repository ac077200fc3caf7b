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

PORTION = 2**20  # elements of a temporary tensor, beyond what a single row needs
ONE = 2**40  # the weight 1; sums over k2 rows stay below 2**63 up to k2 = 2**22

Gather = Callable[[Tensor, Tensor, int], Tensor]


def k_reciprocal(
    q_embedding: ArrayLike | Tensor,
    g_embedding: ArrayLike | Tensor,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Tensor:
    """Return re-ranked distances of queries to gallery images, by the k-reciprocal neighbours that they share.

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
        ValueError: k1, k2 or lambda_value is out of range, an embedding is not finite, shapes disagree, or there is no
            query, gallery image or feature.

    Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017.

    Example:
        >>> distmat = k_reciprocal([[1.0, 0.0]], [[0.0, 1.0], [0.9, 0.1]], k1=1, k2=1)
        >>> distmat.argmin().item()
        1
    """
    reranked = KReciprocal(q_embedding, g_embedding, k1, k2, lambda_value)
    return reranked.distances(slice(0, reranked.num_queries))


def _in_order(rows: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """Gather the rows of a single rank, which are complete and in order."""
    return rows


class KReciprocal:
    """Re-ranked distances, one block of queries at a time; see `k_reciprocal`.

    Ranks may share the work. Each one passes all embeddings, its own blocks, and a collective `gather`.

    Args:
        q_embedding: [Q, D].
        g_embedding: [G, D].
        k1: See `k_reciprocal`.
        k2: See `k_reciprocal`.
        lambda_value: See `k_reciprocal`.
        own_blocks: This rank's part of `neighbours.row_blocks(Q + G)`, possibly empty; None for all blocks.
        gather: Function of rows [n, ...], their positions [n] and the number of rows over all ranks that returns the
            rows of all ranks in order.

    Raises:
        ValueError: As of `k_reciprocal`.
    """

    def __init__(
        self,
        q_embedding: ArrayLike | Tensor,
        g_embedding: ArrayLike | Tensor,
        k1: int,
        k2: int,
        lambda_value: float,
        *,
        own_blocks: Sequence[slice] | None = None,
        gather: Gather = _in_order,
    ) -> None:
        _check_parameters(k1, k2, lambda_value)
        points, self.num_queries = _stack_points(q_embedding, g_embedding)
        blocks = row_blocks(len(points)) if own_blocks is None else own_blocks
        num_mutual = min(k1 + 1, len(points))
        num_half = min(round(k1 / 2) + 1, len(points))  # rounds halves to even, as numpy.around does
        num_averaged = min(k2, len(points))

        nearest_of_blocks = [nearest(points, block, max(num_mutual, num_averaged)) for block in blocks]
        device = points.positions.device
        positions = torch.cat([torch.arange(b.start, b.stop, device=device) for b in blocks] or [_none(device)])
        # A rank without a block takes part in every collective with no rows.
        no_neighbours = _none(device).view(0, max(num_mutual, num_averaged))
        neighbours = gather(torch.cat([no_neighbours, *(ids for ids, _ in nearest_of_blocks)]), positions, len(points))
        no_distances = points.squared_norm[:0]
        farthest = gather(torch.cat([no_distances, *(far for _, far in nearest_of_blocks)]), positions, len(points))
        farthest[farthest == 0] = 1  # all images are equal, and every distance is 0

        encoding = Encoding.of(points, farthest, neighbours[:, :num_mutual], neighbours[:, :num_half])
        weights = _gather_rows([encoding.weights(block) for block in blocks], positions, len(points), gather)
        if num_averaged > 1:
            summed = [weights.summed(neighbours[block, :num_averaged]) for block in blocks]
            weights = _gather_rows(summed, positions, len(points), gather)
        self._points, self._farthest, self._lambda = points, farthest, lambda_value
        self._weights, self._total = weights, ONE * num_averaged
        self._holders = weights.part(slice(self.num_queries, len(points))).transposed(len(points))

    def distances(self, block: slice) -> Tensor:
        """Return the re-ranked distances of a block of queries to the gallery: [b, G]."""
        gallery = self._points.part(slice(self.num_queries, len(self._points)))
        distmat = squared_distances(self._points.part(block), gallery)
        distmat *= self._lambda / self._farthest[block, None]
        distmat += 1 - self._lambda  # the Jaccard distance is 1 where no neighbour is shared
        weights = self._weights.part(block)
        for portion in _portions(weights.num_common(self._holders) + len(gallery)):
            common = weights.part(portion).common(self._holders, len(gallery)).double() / self._total  # [b', G]
            distmat[portion] -= (1 - self._lambda) * (common / (2 - common)).to(distmat.dtype)
        return distmat


def _check_parameters(k1: int, k2: int, lambda_value: float) -> None:
    for name, value in (("k1", k1), ("k2", k2)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} of re-ranking must be a whole number of at least 1, got {value!r}")
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


def _none(device: torch.device) -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device=device)


# ---- sparse rows ----


@dataclass(frozen=True)
class SparseRows:
    """Weights of n rows; the entries starts[i] to starts[i + 1] are those of row i, by column."""

    starts: Tensor  # int64 [n + 1]
    columns: Tensor  # int64 [number of entries]
    weights: Tensor  # int64 [number of entries]

    @classmethod
    def of(cls, counts: Tensor, columns: Tensor, weights: Tensor) -> SparseRows:
        return cls(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), columns, weights)

    @property
    def counts(self) -> Tensor:
        return self.starts.diff()

    def part(self, rows: slice) -> SparseRows:
        starts = self.starts[rows.start : rows.stop + 1]
        entries = slice(int(starts[0]), int(starts[-1]))
        return SparseRows(starts - starts[0], self.columns[entries], self.weights[entries])

    def take(self, rows: Tensor) -> SparseRows:
        """Return any rows [m], which may repeat."""
        counts = self.counts[rows]
        entries = ragged_ranges(self.starts[rows], counts)
        return SparseRows.of(counts, self.columns[entries], self.weights[entries])

    def owners(self) -> Tensor:
        """Return the row of each entry."""
        return torch.repeat_interleave(self.counts)

    def summed(self, groups: Tensor) -> SparseRows:
        """Return the sum of the rows of each group [b, k]."""
        parts = [self._summed(groups[portion]) for portion in _portions(self.counts[groups].sum(1))]
        return concatenate(parts, groups.device)

    def _summed(self, groups: Tensor) -> SparseRows:
        taken = self.take(groups.flatten())
        num_columns = len(self.counts)
        cells, order = (taken.owners() // groups.shape[1] * num_columns + taken.columns).sort()
        cells, entries = torch.unique_consecutive(cells, return_inverse=True)
        weights = torch.zeros_like(cells).index_add_(0, entries, taken.weights[order])
        return SparseRows.of(torch.bincount(cells // num_columns, minlength=len(groups)), cells % num_columns, weights)

    def transposed(self, num_columns: int) -> SparseRows:
        order = self.columns.argsort(stable=True)
        counts = torch.bincount(self.columns, minlength=num_columns)
        return SparseRows.of(counts, self.owners()[order], self.weights[order])

    def num_common(self, transposed: SparseRows) -> Tensor:
        """Return how many pairs of entries `common` compares for each row."""
        counts = transposed.counts[self.columns]
        return torch.zeros_like(self.counts).index_add_(0, self.owners(), counts)

    def common(self, transposed: SparseRows, num_others: int) -> Tensor:
        """Return the shared weight of each row and each of other rows, given transposed: [n, num_others]."""
        others = transposed.take(self.columns)
        shared = torch.minimum(self.weights.repeat_interleave(others.counts), others.weights)
        cells = self.owners().repeat_interleave(others.counts) * num_others + others.columns
        common = shared.new_zeros(len(self.counts) * num_others).index_add_(0, cells, shared)
        return common.view(-1, num_others)


def ragged_ranges(starts: Tensor, counts: Tensor) -> Tensor:
    """Return counts[0] consecutive integers from starts[0], then counts[1] from starts[1], and so on."""
    ends = counts.cumsum(0)
    shifts = (starts - ends + counts).repeat_interleave(counts)
    return shifts + torch.arange(len(shifts), device=shifts.device)


def concatenate(parts: Sequence[SparseRows], device: torch.device) -> SparseRows:
    """Join the rows of all parts."""
    none = [_none(device)]
    return SparseRows.of(
        torch.cat([part.counts for part in parts] or none),
        torch.cat([part.columns for part in parts] or none),
        torch.cat([part.weights for part in parts] or none),
    )


def _gather_rows(parts: Sequence[SparseRows], positions: Tensor, num_rows: int, gather: Gather) -> SparseRows:
    """Return the rows of all ranks, ordered by position."""
    local = concatenate(parts, positions.device)
    counts = gather(local.counts, positions, num_rows)
    starts = counts.cumsum(0) - counts
    entries = torch.stack([local.columns, local.weights], dim=1)
    entries = gather(entries, ragged_ranges(starts[positions], local.counts), int(counts.sum()))
    return SparseRows.of(counts, entries[:, 0].contiguous(), entries[:, 1].contiguous())


def _portions(costs: Tensor) -> list[slice]:
    """Split rows into runs whose costs [n] sum to about `PORTION` elements; a row is never split."""
    _, sizes = torch.unique_consecutive(costs.cumsum(0) // PORTION, return_counts=True)
    stops = sizes.cumsum(0).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


# ---- k-reciprocal encoding ----


@dataclass(frozen=True)
class Encoding:
    """Neighbours and distances from which the weights of a row are computed."""

    points: Points
    farthest: Tensor  # [N] largest squared distance of each row, by which its distances are divided
    nearest: Tensor  # int64 [N, k1 + 1]
    halves: Tensor  # int64 [N, k1/2 + 1] mutual ones of the k1/2 nearest; N elsewhere

    @classmethod
    def of(cls, points: Points, farthest: Tensor, nearest: Tensor, half: Tensor) -> Encoding:
        halves = [mutual(half, portion) for portion in _portions(torch.full((len(half),), half.shape[1] ** 2))]
        return cls(points, farthest, nearest, torch.cat(halves))

    def weights(self, block: slice) -> SparseRows:
        """Return the Gaussian weights of the images in the expanded k-reciprocal sets of a block of rows."""
        num_nearest, num_half = self.nearest.shape[1], self.halves.shape[1]
        costs = torch.full((block.stop - block.start,), num_nearest * (num_nearest + num_half))
        portions = [slice(block.start + part.start, block.start + part.stop) for part in _portions(costs)]
        return concatenate([self._weights(portion) for portion in portions], self.nearest.device)

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
    """Return the nearest images of each row that have the row among their own nearest images.

    Args:
        nearest: int64 [N, k] nearest images of all rows.
        block: Rows to compute.

    Returns:
        [b, k]; N for images that are not mutual.
    """
    own = nearest[block]
    rows = torch.arange(block.start, block.stop, device=own.device)
    is_mutual = (nearest[own] == rows[:, None, None]).any(2)
    return own.masked_fill(~is_mutual, len(nearest))
