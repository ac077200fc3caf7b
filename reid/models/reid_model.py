"""The re-identification model: backbone, pooling, BNNeck, classifier, and the centers of the center loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reid.config.rules import use_center_loss, use_identity_loss
from reid.models.backbones import build_backbone

if TYPE_CHECKING:
    from yacs.config import CfgNode


class ReIDOutput(NamedTuple):
    """What the model gives in training mode."""

    feat: Tensor  # [B, D] before the neck, for the metric losses
    logits: Tensor  # [B, C]


class ReIDModel(nn.Module):
    """Images to embeddings (eval mode) or to features and logits (training mode).

    Args:
        base: a trunk: images to a feature map [B, D, h, w], or to features [B, D].
        num_features: D.
        num_pids: C, training identities.
        bnneck: BatchNorm between feature and classifier, which then has no bias.
        embed_after_neck: whether retrieval compares what comes after the BNNeck or before.
        freeze_bn: the trunk's BatchNorm layers stay as they are, in training mode too.
        with_centers: keep a center [D] for every identity; a buffer, as `losses.center_step` moves it without a
            gradient.

    Source: Luo et al., Bag of Tricks and a Strong Baseline for Deep Person Re-identification, arXiv 1903.07071.
    """

    centers: Tensor

    def __init__(
        self,
        base: nn.Module,
        num_features: int,
        num_pids: int,
        *,
        bnneck: bool,
        embed_after_neck: bool,
        freeze_bn: bool,
        with_centers: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.num_features = num_features
        self.embed_after_neck = embed_after_neck
        self.bottleneck = nn.BatchNorm1d(num_features) if bnneck else nn.Identity()
        self.classifier = nn.Linear(num_features, num_pids, bias=not bnneck)
        if bnneck:
            self.bottleneck.bias.requires_grad = False
            nn.init.normal_(self.classifier.weight, std=0.001)
        self._freeze_bn = freeze_bn
        if freeze_bn:
            for layer in self._batchnorms():
                layer.requires_grad_(requires_grad=False)
        if with_centers:
            self.register_buffer("centers", torch.randn(num_pids, num_features))

    def train(self, mode: bool = True) -> ReIDModel:  # noqa: FBT001, FBT002  # torch's signature
        super().train(mode)
        if self._freeze_bn:
            for layer in self._batchnorms():
                layer.eval()
        return self

    def _batchnorms(self) -> list[_BatchNorm]:
        """Of the trunk, as they are now: SyncBN replaces them."""
        return [layer for layer in self.base.modules() if isinstance(layer, _BatchNorm)]

    def forward(self, images: Tensor) -> Tensor | ReIDOutput:
        """Images [B, 3, H, W] to an embedding [B, D] in eval mode, to `ReIDOutput` in training mode."""
        feat: Tensor = self.base(images)
        if feat.dim() == 4:
            feat = feat.mean((2, 3))  # [B, D]
        if self.training:
            return ReIDOutput(feat, self.classifier(self.bottleneck(feat)))
        return self.bottleneck(feat) if self.embed_after_neck else feat


def build_model(cfg: CfgNode, num_pids: int) -> ReIDModel:
    """The model that the settings describe, with randomly initialised weights.

    Args:
        cfg: the whole configuration; MODEL, TEST.NECK_FEAT and what decides the losses are read.
        num_pids: C, training identities.
    """
    base, num_features = build_backbone(cfg)
    model = ReIDModel(
        base,
        num_features,
        num_pids,
        bnneck=cfg.MODEL.NECK == "bnneck",
        embed_after_neck=cfg.TEST.NECK_FEAT == "after",
        freeze_bn=cfg.MODEL.FREEZE_BN,
        with_centers=use_center_loss(cfg),
    )
    if not use_identity_loss(cfg):
        # Nothing would give them a gradient, and DistributedDataParallel waits for one from every parameter that wants
        # it.
        for parameter in (*model.bottleneck.parameters(), *model.classifier.parameters()):
            parameter.requires_grad = False
    return model
