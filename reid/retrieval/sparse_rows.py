"""Sparse matrices of integer weights, by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PORTION = 2**20  # elements of a temporary tensor, beyond what a single row needs


@dataclass(frozen=True)
class SparseRows:
    """Weights of n rows, by column; row i has the entries starts[i] to starts[i + 1]."""

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
        parts = [self._summed(groups[portion]) for portion in portions(self.counts[groups].sum(1))]
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
    none, names = torch.zeros(0, dtype=torch.int64, device=device), ("counts", "columns", "weights")
    return SparseRows.of(*(torch.cat([none, *(getattr(part, name) for part in parts)]) for name in names))


def portions(costs: Tensor) -> list[slice]:
    """Split rows into runs whose costs [n] sum to about PORTION elements; a row is never split."""
    _, sizes = torch.unique_consecutive(costs.cumsum(0) // PORTION, return_counts=True)
    stops = sizes.cumsum(0).tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
