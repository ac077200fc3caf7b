"""Identity classification loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def label_smoothed_cross_entropy(logits: Tensor, pids: Tensor, epsilon: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return the cross entropy against the targets (1 - epsilon) * one-hot + epsilon / C.

    Args:
        logits: [B, C] outputs of the classifier.
        pids: [B], 0..C-1.
        epsilon: Label smoothing; 0 for plain cross entropy.

    Returns:
        Sum over the batch (scalar) and B.

    Source: Szegedy et al., Rethinking the Inception Architecture, arXiv 1512.00567, section 7.
    """
    total = F.cross_entropy(logits, pids, reduction="sum", label_smoothing=epsilon)
    return total, logits.new_full((), len(pids))
