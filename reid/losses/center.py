"""Center loss, and the step of its centers."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12  # a squared distance is clamped to [_TINY, 1 / _TINY], as published


def center_loss(feat: Tensor, pids: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared Euclidean distance of every feature to the center of its identity.

    Args:
        feat: [B, D] features.
        pids: [B], 0..C-1.
        centers: [C, D].

    Returns:
        Sum over the batch (scalar) and B.

    Source: Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016, eq. 2, without
        its factor 1/2, as in reid-strong-baseline.
    """
    squared = (feat - centers[pids]).square().sum(1)  # [B]
    return squared.clamp(_TINY, 1 / _TINY).sum(), feat.new_full((), len(pids))


@torch.no_grad()
def center_step(feat: Tensor, pids: Tensor, centers: Tensor, learning_rate: float) -> None:
    """Move the centers by one SGD step on the mean center loss, which SOLVER.CENTER_LOSS_WEIGHT does not scale.

    The gradient of center k is 2 / B times the sum of (center k - feat) over the batch's images of identity k.

    Args:
        feat: [B, D] features of the global batch.
        pids: [B], 0..C-1.
        centers: [C, D], changed in place.
        learning_rate: Learning rate of the centers.
    """
    steps = (feat - centers[pids]).mul_(2 * learning_rate / len(pids))  # [B, D]
    # By a product, as index_add_ on a GPU rounds in any order, and replicas must stay equal.
    same = (pids[:, None] == pids[None, :]).to(steps.dtype)  # [B, B]
    centers[pids] += same @ steps
