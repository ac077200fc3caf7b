"""Center loss, and the step of its centers."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12  # a squared distance is clamped to [_TINY, 1 / _TINY], as published


def center_loss(feat: Tensor, pids: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared Euclidean distance of every feature to the center of its identity.

    Args:
        feat: [B, D].
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
    """One step of plain SGD on the mean center loss, in place; the loss's weight plays no part in it.

    The gradient with respect to center k is 2 / B times the sum of (center k - feat) over the batch's images of
    identity k.

    Args:
        feat: [B, D], the global batch.
        pids: [B].
        centers: [C, D].
        learning_rate: of the centers.
    """
    steps = (feat - centers[pids]).mul_(2 * learning_rate / len(pids))  # [B, D]
    # Summed by a product, not by index_add_, whose order (and so rounding) is left open on GPUs: replicas stay equal.
    same = (pids[:, None] == pids[None, :]).to(steps.dtype)  # [B, B]
    centers[pids] += same @ steps
