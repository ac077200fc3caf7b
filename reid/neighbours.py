"""Exact nearest neighbours among N images, at the speed of the matrix product, in memory linear in N; pure.

A product proposes a row's nearest images; these are measured again pair by pair, and bounds on the rounding of the
product say whether others can be as near. So a neighbour depends neither on the block nor on the rank that computes its
row, equal images are at equal distance, and among images at equal distance the one that stands first is the nearer one.
On CPUs that multiply bfloat16 faster, a product in bfloat16 proposes first; the rows that its wider bounds leave open
are proposed for again.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

PRODUCT_ROWS, PRODUCT_ELEMENTS = 512, 2**24  # of one matrix product; the rows are fewer where they are long
SPARE = 16  # images proposed beyond the nearest that are wanted
COARSE_SPARE, COARSE_FARTHEST = 64, 16  # by a product in bfloat16: beyond the nearest, and at the other end
COARSE_UNIT = 1.02 * 2.0**-9  # relative rounding to bfloat16
GATHERED_ELEMENTS = 2**24  # of rows that are copied for pairs


@dataclass(frozen=True)
class Coarse:
    """The images about their mean, in bfloat16."""

    positions: Tensor  # bfloat16 [N, D]
    squared_norm: Tensor  # float32 [N]
    moved: Tensor  # float32 [N] by rounding
    longest: float  # of all images
    most_moved: float

    @classmethod
    def of(cls, positions: Tensor) -> Coarse:
        rounded = torch.empty_like(positions, dtype=torch.bfloat16)
        squared_norm, moved = (torch.empty(len(positions)) for _ in range(2))
        mean = positions.mean(0)
        for block in row_blocks(len(positions)):
            exact = (positions[block] - mean).float()
            rounded[block] = exact
            squared_norm[block] = rounded[block].float().square().sum(1)
            moved[block] = torch.linalg.vector_norm(exact - rounded[block], dim=1)
        moved += 2.0**-22 * squared_norm.sqrt()  # by the rounding to float32
        return cls(rounded, squared_norm, moved, float(squared_norm.max().sqrt()), float(moved.max()))

    def part(self, rows: slice) -> Coarse:
        return Coarse(self.positions[rows], self.squared_norm[rows], self.moved[rows], self.longest, self.most_moved)


@dataclass(frozen=True)
class Points:
    """N images, moved and scaled so that distances between them are accurate."""

    positions: Tensor  # [N, D]
    squared_norm: Tensor  # [N]
    coarse: Coarse | None = None  # where it is worth while

    @classmethod
    def of(cls, embedding: Tensor) -> Points:
        """The points of embeddings [N, D], which are overwritten.

        The origin becomes the shortest embedding, so that |x|^2 + |y|^2 - 2 xy does not cancel more than the farthest
        image of a row allows: either |x|^2 is at most 4 times its squared distance. A difference from the shortest is
        rounded no more coarsely than the embeddings were, and where all are equal it is exactly 0. The scale is a power
        of 2, so that no square over- or underflows; ratios of distances depend on neither.
        """
        largest = torch.stack(torch.aminmax(embedding)).abs().max()
        _, largest_exponent = math.frexp(torch.finfo(embedding.dtype).max)
        embedding *= 2.0 ** min(-int(torch.frexp(largest).exponent), largest_exponent - 1)
        embedding -= embedding[torch.linalg.vector_norm(embedding, dim=1).argmin()].clone()
        if embedding.is_cuda:
            return cls(embedding, torch.linalg.vector_norm(embedding, dim=1).square())
        every = torch.arange(len(embedding))
        squared_norm = _sampled_product(embedding, embedding, torch.ones_like(every), every)
        return cls(embedding, squared_norm, Coarse.of(embedding) if has_fast_bfloat16() else None)

    def __len__(self) -> int:
        return len(self.squared_norm)

    def part(self, rows: slice | Tensor) -> Points:
        """Some of the points, without their coarse form."""
        return Points(self.positions[rows], self.squared_norm[rows])


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 faster than in float32."""
    return bool(torch.backends.mkldnn.is_available()) and torch.cpu._is_avx512_bf16_supported()  # type: ignore[no-untyped-call]


def row_blocks(num_images: int) -> list[slice]:
    """The blocks of the N images that are computed together, on whichever rank."""
    size = min(PRODUCT_ROWS, max(1, PRODUCT_ELEMENTS // num_images))
    return [slice(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def squared_distances(rows: Points, columns: Points) -> Tensor:
    """Squared distances [n, m] by one matrix product, not negative."""
    product = torch.addmm(columns.squared_norm, rows.positions, columns.positions.T, alpha=-2)
    return product.add_(rows.squared_norm[:, None]).clamp_(min=0)


def pair_distances(rows: Points, points: Points, counts: Tensor, columns: Tensor) -> Tensor:
    """Squared distances of single pairs, each computed alike wherever it stands among the others.

    Args:
        rows: the first images [b] of the pairs.
        points: N images.
        counts: [b] pairs of each first image.
        columns: [sum of counts] the second images, row by row, in ascending order.

    Returns:
        [sum of counts]; exactly 0 between equal images.
    """
    if rows.positions.is_cuda:
        return _gathered_distances(rows, points, counts, columns)
    products = _sampled_product(rows.positions, points.positions, counts, columns)
    norms = torch.repeat_interleave(rows.squared_norm, counts) + points.squared_norm[columns]
    return norms.sub_(products, alpha=2).clamp_(min=0)


def _gathered_distances(rows: Points, points: Points, counts: Tensor, columns: Tensor) -> Tensor:
    """`pair_distances` where copies of the rows are cheap."""
    owners = torch.repeat_interleave(counts)
    distances = torch.empty_like(columns, dtype=points.positions.dtype)
    size = max(1, GATHERED_ELEMENTS // points.positions.shape[1])
    for start in range(0, len(columns), size):
        part = slice(start, start + size)
        difference = rows.positions[owners[part]].sub_(points.positions[columns[part]])
        distances[part] = difference.square_().sum(1)
    return distances


def _sampled_product(rows: Tensor, positions: Tensor, counts: Tensor, columns: Tensor) -> Tensor:
    """Scalar products of single pairs on the CPU, in a tenth of the time that gathering the second rows would take."""
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shape = (len(rows), len(positions))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        pattern = torch.sparse_csr_tensor(starts, columns, rows.new_zeros(len(columns)), shape, check_invariants=False)
        product: Tensor = torch.sparse.sampled_addmm(pattern, rows, positions.T, beta=0)
    return product.values()


def nearest(points: Points, block: slice, count: int) -> tuple[Tensor, Tensor]:
    """The nearest images of each row, the row itself among them, and how far the farthest is.

    Args:
        points: N images.
        block: rows of them.
        count: at most N.

    Returns:
        int64 [b, count], by distance, at equal distance by place; squared distances [b].
    """
    rows = points.part(block)
    if points.coarse is None:
        return _nearest_by_product(rows, points, count)
    neighbours, farthest, is_certain = _nearest_by_coarse_product(rows, points, points.coarse.part(block), count)
    left = (~is_certain).nonzero()[:, 0]
    if len(left):
        neighbours[left], farthest[left] = _nearest_by_product(rows.part(left), points, count)
    return neighbours, farthest


def _nearest_by_product(rows: Points, points: Points, count: int) -> tuple[Tensor, Tensor]:
    product = torch.addmm(points.squared_norm, rows.positions, points.positions.T, alpha=-2)  # + |row|^2 [b, N]
    proposed = product.topk(min(count + SPARE, len(points)), dim=1, largest=False, sorted=False)
    neighbours, last = _nearest_of_proposed(proposed.indices, rows, points, count)
    if proposed.indices.shape[1] < len(points):
        limits = last + _slack(rows, last) - rows.squared_norm
        for row in (proposed.values.amax(1) <= limits).nonzero()[:, 0].tolist():
            candidates = (product[row] <= limits[row]).nonzero()[:, 0]
            neighbours[row] = _nearest_of(candidates, rows.part(slice(row, row + 1)), points, count)
    return neighbours, product.amax(1).add_(rows.squared_norm).clamp_(min=0)


def _slack(rows: Points, distances: Tensor) -> Tensor:
    """By how much a product and a measured pair can differ for an image at these squared distances [b] or nearer.

    A scalar product of D terms is off by at most D eps |x| |y| / 2, however it is summed, and the other image is not
    longer than |x| + distance^(1/2). Both are off.
    """
    unit = torch.finfo(distances.dtype).eps * (rows.positions.shape[1] + 8)
    return unit * (2 * rows.squared_norm.sqrt() + distances.sqrt()).square()


def _nearest_by_coarse_product(
    rows: Points, points: Points, coarse: Coarse, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nearest`, and bool [b]: where no image that was not proposed can be as near or farther."""
    assert points.coarse is not None
    dots = coarse.positions @ points.coarse.positions.T  # bfloat16, although summed in float32
    product = torch.add(points.coarse.squared_norm, dots, alpha=-2)  # + |row|^2 [b, N]
    near = product.topk(min(count + COARSE_SPARE, len(points)), dim=1, largest=False, sorted=False)
    neighbours, last = _nearest_of_proposed(near.indices, rows, points, count)
    far = product.topk(min(COARSE_FARTHEST, len(points)), dim=1, sorted=False)
    _, measured = _measure(far.indices, rows, points)
    farthest = measured.amax(1)

    # Whatever is as near as the last one is still within this reach when both have moved by rounding.
    reach = (last + _slack(rows, last)).sqrt().float() + coarse.moved
    norm = coarse.squared_norm.sqrt()
    reach += (1.02 * COARSE_UNIT * (norm + reach)).clamp(max=coarse.most_moved)
    limits = reach.square() + _coarse_slack(coarse, norm, reach) - coarse.squared_norm
    is_certain = (near.values.amax(1) > limits) | (near.indices.shape[1] == len(points))
    reach = (farthest.sqrt().float() - coarse.moved - coarse.most_moved).clamp(min=0)
    limits = reach.square() - _coarse_slack(coarse, norm, reach) - coarse.squared_norm
    is_certain &= (far.values.amin(1) < limits) | (far.indices.shape[1] == len(points))
    return neighbours, farthest, is_certain


def _coarse_slack(coarse: Coarse, norm: Tensor, reach: Tensor) -> Tensor:
    """By how much a product in bfloat16 can be off from the square of a distance [b] between what is rounded.

    Twice the scalar product is |x|^2 + |y|^2 - reach^2, where |y| is between | |x| - reach | and their sum. It is
    summed in float32 and then rounded.
    """
    length = (norm + reach).clamp(max=coarse.longest)
    largest = norm.square() + length.square() - reach.square()
    smallest = 2 * norm * (norm - reach)
    summing = 2.0**-24 * (coarse.positions.shape[1] + 8)
    return COARSE_UNIT * torch.maximum(largest.abs(), smallest.abs()) + 1.02 * summing * (norm + length).square()


def _nearest_of_proposed(proposed: Tensor, rows: Points, points: Points, count: int) -> tuple[Tensor, Tensor]:
    """The nearest among the images [b, m] proposed for each row: [b, count], and the last one's distance [b]."""
    columns, distances = _measure(proposed, rows, points)
    order = distances.argsort(dim=1, stable=True)[:, :count]
    return columns.gather(1, order), distances.gather(1, order[:, -1:])[:, 0]


def _measure(proposed: Tensor, rows: Points, points: Points) -> tuple[Tensor, Tensor]:
    """The images [b, m] proposed for each row, in ascending order, and their squared distances."""
    columns = proposed.sort(dim=1).values
    counts = columns.new_full((len(rows),), columns.shape[1])
    return columns, pair_distances(rows, points, counts, columns.flatten()).view(columns.shape)


def _nearest_of(candidates: Tensor, row: Points, points: Points, count: int) -> Tensor:
    """The nearest among many candidates, which are given in ascending order: [count]."""
    best, distances = candidates[:0], row.squared_norm[:0]
    size = 2 * count
    while len(candidates):
        part, candidates = candidates[:size], candidates[size:]
        measured = pair_distances(row, points, candidates.new_tensor([len(part)]), part)
        best, distances = torch.cat([best, part]), torch.cat([distances, measured])
        order = distances.argsort(stable=True)[:count]
        best, distances = best[order], distances[order]
        if len(best) == count and distances[-1] == 0:  # equal images: later ones stand behind
            break
        size *= 2
    return best
