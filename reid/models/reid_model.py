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
    """Output of the model in training mode."""

    feat: Tensor  # [B, D] before the neck, for the metric losses
    logits: Tensor  # [B, C]


class ReIDModel(nn.Module):
    """Backbone, pooling, neck and classifier: images to embeddings, or in training mode to features and logits.

    Args:
        base: Backbone: images [B, 3, H, W] to a feature map [B, D, h, w], or to features [B, D].
        num_features: Length D of a feature.
        num_pids: Number C of training identities.
        bnneck: Whether there is a BatchNorm between feature and classifier, which then has no bias.
        embed_after_neck: Whether the embedding is the feature after the neck or before it.
        freeze_bn: Whether the backbone's BatchNorm layers stay in evaluation mode, without gradient.
        with_centers: Whether there is a center [D] for every identity. It is a buffer, as `center_step` moves it
            without a gradient.

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
        """Return the backbone's layers, which SyncBN may have replaced since the last call."""
        return [layer for layer in self.base.modules() if isinstance(layer, _BatchNorm)]

    def forward(self, images: Tensor) -> Tensor | ReIDOutput:
        """Return the embedding [B, D] of images [B, 3, H, W]; in training mode, feature and logits."""
        feat: Tensor = self.base(images)
        if feat.dim() == 4:
            feat = feat.mean((2, 3))  # [B, D]
        if self.training:
            return ReIDOutput(feat, self.classifier(self.bottleneck(feat)))
        return self.bottleneck(feat) if self.embed_after_neck else feat


def build_model(cfg: CfgNode, num_pids: int) -> ReIDModel:
    """Return the model that the settings describe, with random weights, in eval mode: images to embeddings.

    Args:
        cfg: Complete configuration; MODEL, TEST.NECK_FEAT and the choice of losses are read.
        num_pids: Number C of training identities.
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
        # They would get no gradient, and DistributedDataParallel waits for one for every parameter that requires it.
        for parameter in (*model.bottleneck.parameters(), *model.classifier.parameters()):
            parameter.requires_grad = False
    return model.eval()
