"""Exact nearest neighbors, at the speed of the matrix product under them.

A product proposes the nearest images of a row. They are measured again pair by pair, and a bound on the rounding of the
product shows whether another image can be as near. A neighbor therefore depends neither on the block nor on the rank
that computes its row, equal images are at equal distance, and images at equal distance are in the order of their
positions.

`nearest` serves re-ranking: all N images against each other, in memory linear in N. `nearest_in_gallery` serves search:
a few queries against a gallery that may be memory-mapped.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from reid.retrieval.distances import Distance
from reid.retrieval.metrics import query_blocks

PRODUCT_ROWS, PRODUCT_ELEMENTS = 512, 2**24  # largest size of one matrix product
SPARE = 16  # proposed images beyond the number of neighbors
GATHERED_ELEMENTS = 2**24  # elements of the rows copied at once to measure pairs


@dataclass(frozen=True)
class Points:
    """N images, moved and scaled so that distances between them are accurate."""

    positions: Tensor  # [N, D]
    squared_norm: Tensor  # [N]

    @classmethod
    def of(cls, embedding: Tensor) -> Points:
        """Return the points of embeddings [N, D], which are overwritten.

        The origin becomes the shortest embedding. Then |x|^2 is at most 4 times the squared distance of x to its
        farthest image, so |x|^2 + |y|^2 - 2 xy cancels no more than that distance allows. Equal embeddings become
        exactly 0. The scale is a power of 2 that keeps squares from over- and underflowing. Ratios of distances depend
        on neither.
        """
        largest = torch.stack(torch.aminmax(embedding)).abs().max()
        _, largest_exponent = math.frexp(torch.finfo(embedding.dtype).max)
        embedding *= 2.0 ** min(-int(torch.frexp(largest).exponent), largest_exponent - 1)
        embedding -= embedding[torch.linalg.vector_norm(embedding, dim=1).argmin()].clone()
        if embedding.is_cuda:
            return cls(embedding, torch.linalg.vector_norm(embedding, dim=1).square())
        every = torch.arange(len(embedding))
        return cls(embedding, _sampled_product(embedding, embedding, torch.ones_like(every), every))

    def __len__(self) -> int:
        return len(self.squared_norm)

    def part(self, rows: slice | Tensor) -> Points:
        """Return some of the points."""
        return Points(self.positions[rows], self.squared_norm[rows])


def row_blocks(num_images: int) -> list[slice]:
    """Return the blocks of the N images that are computed together, on any number of ranks."""
    size = min(PRODUCT_ROWS, max(1, PRODUCT_ELEMENTS // num_images))
    return [slice(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def squared_distances(rows: Points, columns: Points) -> Tensor:
    """Return the squared distances [n, m] by one matrix product, clamped at 0."""
    product = torch.addmm(columns.squared_norm, rows.positions, columns.positions.T, alpha=-2)
    return product.add_(rows.squared_norm[:, None]).clamp_(min=0)


def pair_distances(rows: Points, points: Points, counts: Tensor, columns: Tensor) -> Tensor:
    """Return the squared distances of single pairs; a pair's distance does not depend on the other pairs.

    Args:
        rows: First images [b] of the pairs.
        points: All N images.
        counts: [b] number of pairs of each first image.
        columns: [sum of counts] second images, row by row, in ascending order.

    Returns:
        [sum of counts]; exactly 0 between equal images.
    """
    if rows.positions.is_cuda:
        return _gathered_distances(rows, points, counts, columns)
    products = _sampled_product(rows.positions, points.positions, counts, columns)
    norms = torch.repeat_interleave(rows.squared_norm, counts) + points.squared_norm[columns]
    return norms.sub_(products, alpha=2).clamp_(min=0)


def _gathered_distances(rows: Points, points: Points, counts: Tensor, columns: Tensor) -> Tensor:
    """Compute `pair_distances` on a GPU, where copies of the rows are cheap."""
    owners = torch.repeat_interleave(counts)
    distances = torch.empty_like(columns, dtype=points.positions.dtype)
    size = max(1, GATHERED_ELEMENTS // points.positions.shape[1])
    for start in range(0, len(columns), size):
        part = slice(start, start + size)
        difference = rows.positions[owners[part]].sub_(points.positions[columns[part]])
        distances[part] = difference.square_().sum(1)
    return distances


def _sampled_product(rows: Tensor, positions: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
    """Return the scalar products of single pairs on a CPU, ten times as fast as by gathering the second rows."""
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shape = (len(rows), len(positions))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(starts, columns, rows.new_zeros(len(columns)), shape, check_invariants=False)
        product: Tensor = torch.sparse.sampled_addmm(pattern, rows, positions.T, beta=0)
    return product.values()


def nearest(points: Points, block: slice, count: int) -> tuple[Tensor, Tensor]:
    """Return the nearest images of each row, the row itself included, and the distance of its farthest image.

    Args:
        points: All N images.
        block: Rows whose neighbors are computed.
        count: Number of neighbors, at most N.

    Returns:
        int64 [b, count] by distance, then by position; squared distances [b].
    """
    rows = points.part(block)
    product = torch.addmm(points.squared_norm, rows.positions, points.positions.T, alpha=-2)  # + |row|^2 [b, N]
    proposed = product.topk(min(count + SPARE, len(points)), dim=1, largest=False, sorted=False)
    neighbors, last = _nearest_of_proposed(proposed.indices, rows, points, count)
    if proposed.indices.shape[1] < len(points):
        limits = last + _slack(rows, last) - rows.squared_norm
        for row in (proposed.values.amax(1) <= limits).nonzero()[:, 0].tolist():
            candidates = (product[row] <= limits[row]).nonzero()[:, 0]
            neighbors[row] = _nearest_of(candidates, rows.part(slice(row, row + 1)), points, count)
    return neighbors, product.amax(1).add_(rows.squared_norm).clamp_(min=0)


def _slack(rows: Points, distances: Tensor) -> Tensor:
    """Bound the difference between product and measured pair for images at these squared distances [b] or nearer.

    A scalar product of D terms is off by at most D eps |x| |y| / 2, in any order of summation, and the other image is
    not longer than |x| + distance^(1/2). Both values are off.
    """
    unit = torch.finfo(distances.dtype).eps * (rows.positions.shape[1] + 8)
    return unit * (2 * rows.squared_norm.sqrt() + distances.sqrt()).square()


def _nearest_of_proposed(proposed: Tensor, rows: Points, points: Points, count: int) -> tuple[Tensor, Tensor]:
    """Return the nearest among the images [b, m] proposed for each row: [b, count], and the last one's distance [b]."""
    columns = proposed.sort(dim=1).values
    counts = columns.new_full((len(rows),), columns.shape[1])
    distances = pair_distances(rows, points, counts, columns.flatten()).view(columns.shape)
    order = distances.argsort(dim=1, stable=True)[:, :count]
    return columns.gather(1, order), distances.gather(1, order[:, -1:])[:, 0]


def _nearest_of(candidates: Tensor, row: Points, points: Points, count: int) -> Tensor:
    """Return the nearest among many candidates, given in ascending order: [count]."""
    best, distances = candidates[:0], row.squared_norm[:0]
    size = 2 * count
    while len(candidates):
        part, candidates = candidates[:size], candidates[size:]
        measured = pair_distances(row, points, candidates.new_tensor([len(part)]), part)
        best, distances = torch.cat([best, part]), torch.cat([distances, measured])
        order = distances.argsort(stable=True)[:count]
        best, distances = best[order], distances[order]
        if len(best) == count and distances[-1] == 0:  # equal images; later ones rank after them
            break
        size *= 2
    return best


# ---- search ----


def nearest_in_gallery(
    q_embedding: Tensor, g_embedding: Tensor, count: int, *, distance: Distance
) -> tuple[Tensor, Tensor]:
    """Return the nearest gallery images of every query, measured in float64, nearest first.

    Args:
        q_embedding: float32 [Q, D], finite; of length 1 for the cosine distance.
        g_embedding: float32 [G, D] in the same form; may be memory-mapped.
        count: Number k of images for each query; all G where there are fewer.
        distance: "cosine" for 1 minus the inner product, "euclidean" for the distance itself.

    Returns:
        Distances float64 [Q, min(k, G)]; positions in the gallery int64, of the same shape. Images at equal distance
        are in gallery order.
    """
    count, g_length = min(count, len(g_embedding)), torch.linalg.vector_norm(g_embedding, dim=1)
    longest, g_square = float(g_length.max()), g_length.square()
    costs, positions = [], []
    for block in query_blocks(len(q_embedding), len(g_embedding)):
        queries = q_embedding[block]
        if distance == "cosine":
            product = -queries @ g_embedding.T  # [b, G]
        else:
            product = torch.addmm(g_square, queries, g_embedding.T, alpha=-2) + queries.square().sum(1, keepdim=True)
        proposed = product.topk(min(count + SPARE, len(g_embedding)), dim=1, largest=False, sorted=False)
        for row, query in enumerate(queries):
            candidates = proposed.indices[row].sort().values
            cost = _exact_costs(query, g_embedding, candidates, distance)
            limit = cost.kthvalue(count).values + _float32_rounding(query, longest, distance)
            if len(candidates) < len(g_embedding) and proposed.values[row].max() <= limit:
                candidates = (product[row] <= limit).nonzero()[:, 0]
                cost = _exact_costs(query, g_embedding, candidates, distance)
            order = cost.argsort(stable=True)[:count]
            costs.append(cost[order])
            positions.append(candidates[order])
    distances = torch.stack(costs)
    return (1 + distances if distance == "cosine" else distances.sqrt()), torch.stack(positions)


def _exact_costs(query: Tensor, gallery: Tensor, candidates: Tensor, distance: Distance) -> Tensor:
    """Return minus the inner products, or the squared distances, in float64; equal images have equal costs: [m]."""
    parts = []
    for part in torch.split(candidates, max(1, GATHERED_ELEMENTS // gallery.shape[1])):
        rows = gallery[part].double()
        parts.append(-(rows * query).sum(1) if distance == "cosine" else (rows - query).square().sum(1))
    return torch.cat(parts)


def _float32_rounding(query: Tensor, longest: float, distance: Distance) -> float:
    """Bound the error of a float32 cost in any order of summation (Higham, Accuracy and Stability, section 3.1)."""
    length = float(query.norm())
    scale = length * longest if distance == "cosine" else 2 * (length + longest) ** 2
    return 1.1 * (len(query) + 4) * 2.0**-24 * scale
