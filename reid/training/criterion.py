"""The criterion: the chosen losses of the global batch and their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from reid.config.rules import label_smoothing, use_center_loss, use_identity_loss, use_triplet_loss
from reid.distributed import collectives
from reid.losses.center import center_loss, center_step
from reid.losses.identity import label_smoothed_cross_entropy
from reid.losses.triplet import batch_hard_triplet
from reid.models.reid_model import ReIDOutput

if TYPE_CHECKING:
    from yacs.config import CfgNode


class Losses(NamedTuple):
    """The losses of one step."""

    to_minimize: Tensor  # scalar whose gradient, averaged over the ranks, is that of the global batch's loss
    shares: dict[str, Tensor]  # detached scalars; their sums over the ranks are the logged values of the global batch
    all_feat: Tensor  # [B, D] of the global batch, detached; only this rank's if no loss needs those of the others
    all_pids: Tensor  # [B]


class Criterion:
    """Sum of the identity, triplet and center losses that the settings choose; stateless.

    Args:
        cfg: Complete configuration; MODEL, DATALOADER.SAMPLER and SOLVER are read.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._identity = use_identity_loss(cfg)
        self._epsilon = label_smoothing(cfg)
        self._triplet = use_triplet_loss(cfg)
        self._margin: float | None = cfg.SOLVER.MARGIN
        self._center = use_center_loss(cfg)
        self._center_weight: float = cfg.SOLVER.CENTER_LOSS_WEIGHT
        self._center_lr: float = cfg.SOLVER.CENTER_LR

    def __call__(self, output: ReIDOutput, pids: Tensor, centers: Tensor | None) -> Losses:
        """Compute the losses, in float32 or float64.

        Every term is a mean over the global batch. A sum over this rank's images is divided by the global count. The
        triplet loss is computed in full on every rank. Both are multiplied by the number of ranks, because gradients
        are averaged over them.

        Args:
            output: Model output for this rank's images, equally many on every rank.
            pids: Identities [B_rank].
            centers: Class centers [C, D]; None without a center loss.
        """
        feat, logits = (x if x.dtype == torch.float64 else x.float() for x in output)
        num_ranks = collectives.num_ranks()
        count = len(pids) * num_ranks
        losses, shares = [], {}
        all_feat, all_pids = collectives.global_batch(feat, pids) if self._triplet or self._center else (feat, pids)
        if self._identity:
            value = label_smoothed_cross_entropy(logits, pids, self._epsilon)[0] / count
            losses.append(value)
            shares["id"] = value.detach()
        if self._triplet:
            total, num_anchors = batch_hard_triplet(all_feat, all_pids, self._margin)
            value = total / num_anchors.clamp(min=1)
            losses.append(value)
            shares["triplet"] = value.detach() / num_ranks
            shares["anchors"] = num_anchors / count / num_ranks
        if self._center:
            assert centers is not None
            value = self._center_weight * center_loss(feat, pids, centers)[0] / count
            losses.append(value)
            shares["center"] = value.detach()
        shares["loss"] = torch.stack([shares[name] for name in ("id", "triplet", "center") if name in shares]).sum()
        shares["acc"] = (logits.detach().argmax(1) == pids).sum() / count
        return Losses(num_ranks * torch.stack(losses).sum(), shares, all_feat.detach(), all_pids)

    def move_centers(self, losses: Losses, centers: Tensor) -> None:
        """Move the centers in place by one SGD step on the global batch."""
        center_step(losses.all_feat, losses.all_pids, centers, self._center_lr)
