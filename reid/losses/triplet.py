"""Batch-hard triplet loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-12  # smallest squared distance: the square root has no gradient at 0


def batch_hard_distances(feat: Tensor, pids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Euclidean distance of every anchor to its hardest positive and its hardest negative.

    The pairs are chosen on the matrix product without gradient. Only their distances are computed by subtraction, which
    has neither the product's cancellation nor its [B, B] backward.

    Args:
        feat: [B, D].
        pids: [B].

    Returns:
        Distances [B] to the farthest feature of the same identity (the anchor itself included), distances [B] to the
        nearest feature of another identity, and bool [B], true for anchors with both a positive and a negative.
    """
    same = pids[:, None] == pids[None, :]  # [B, B]
    with torch.no_grad():
        squares = feat.square().sum(1)
        squared = squares[:, None] + squares[None, :] - 2 * (feat @ feat.T)
        hardest_positive = squared.masked_fill(~same, -torch.inf).argmax(1)  # [B]
        hardest_negative = squared.masked_fill(same, torch.inf).argmin(1)  # [B]
        counts = (same.sum(1) > 1) & ~same.all(1)
    return _distance(feat, feat[hardest_positive]), _distance(feat, feat[hardest_negative]), counts


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(1).clamp(min=_TINY).sqrt()


def batch_hard_triplet(feat: Tensor, pids: Tensor, margin: float | None) -> tuple[Tensor, Tensor]:
    """Return the triplet loss with the hardest positive and negative of each anchor.

    Args:
        feat: [B, D].
        pids: [B], any number of images per identity; anchors without a positive or without a negative are left out.
        margin: Margin in units of Euclidean distance; None for the soft margin log(1 + exp(.)).

    Returns:
        Sum over the anchors that count (scalar), and their number.

    Source: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, arXiv 1703.07737, eq. 5.
    """
    positive, negative, counts = batch_hard_distances(feat, pids)
    gap = positive - negative
    per_anchor = F.softplus(gap) if margin is None else F.relu(gap + margin)  # [B]
    return torch.where(counts, per_anchor, 0.0).sum(), counts.sum().to(feat.dtype)
