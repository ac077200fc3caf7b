"""Backbones by name: networks that turn images into feature maps, under the published parameter names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from reid.models import timm_backbones

if TYPE_CHECKING:
    from yacs.config import CfgNode

Color = tuple[float, ...]  # red, green, blue


class ResNetBackbone(resnet.ResNet):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's ResNet without pooling and classifier, under torchvision's (and the published) parameter names.

    Args:
        block: BasicBlock or Bottleneck.
        layers: Number of blocks in each of the four stages.
        last_stride: Stride of the last stage, 1 or 2.
        stem_relu: Whether a ReLU follows the first BatchNorm; the published models have none.
    """

    def __init__(
        self,
        block: type[resnet.BasicBlock | resnet.Bottleneck],
        layers: list[int],
        *,
        last_stride: int,
        stem_relu: bool,
    ) -> None:
        super().__init__(block, layers)
        self.num_features = 512 * block.expansion
        self.stem_relu = stem_relu
        del self.fc, self.avgpool
        _set_last_stride(self, last_stride)

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map [B, D, h, w] of images [B, 3, H, W]: 1/16 of their size, 1/32 with last stride 2."""
        x = self.bn1(self.conv1(images))
        if self.stem_relu:
            x = self.relu(x)
        x = self.maxpool(x)
        feature_map: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return feature_map


class IBN(nn.Module):
    """InstanceNorm of the first half of the channels, BatchNorm of the others.

    Args:
        num_channels: Channels of both halves together.

    Source: Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, arXiv 1807.09441.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_instance_normed = num_channels // 2
        self.IN = nn.InstanceNorm2d(self.num_instance_normed, affine=True)  # named as in published files
        self.BN = nn.BatchNorm2d(num_channels - self.num_instance_normed)

    def forward(self, x: Tensor) -> Tensor:
        first, others = x.tensor_split([self.num_instance_normed], dim=1)
        return torch.cat([self.IN(first), self.BN(others)], dim=1)


class IBNBackbone(ResNetBackbone):
    """ResNet-IBN-a: the first norm of every block of the first three stages is an `IBN`."""

    def __init__(self, layers: list[int], *, last_stride: int, stem_relu: bool) -> None:
        del stem_relu  # the stem always has its ReLU
        super().__init__(resnet.Bottleneck, layers, last_stride=last_stride, stem_relu=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                block.bn1 = IBN(block.conv1.out_channels)
        # Published checkpoints hold the unused ImageNet classifier. It is frozen, as no loss reaches it.
        self.fc = nn.Linear(self.num_features, 1000).requires_grad_(requires_grad=False)


def _senet(block: str, layers: tuple[int, ...], groups: int, *, last_stride: int, stem_relu: bool, **stem: Any) -> Any:
    from timm.models import senet  # takes seconds, and most runs do without it

    del stem_relu  # the stem always has its ReLU
    without_head: dict[str, Any] = {"num_classes": 0, "global_pool": "", "drop_rate": 0}
    backbone = senet.SENet(getattr(senet, block), layers, groups=groups, reduction=16, **without_head, **stem)
    _set_last_stride(backbone, last_stride)
    return backbone


def _set_last_stride(backbone: Any, stride: int) -> None:
    """Set the stride of the last stage's first block, which Caffe's layout has in its first convolution."""
    first = backbone.layer4[0]
    for convolution in (first.conv1, first.conv2, first.downsample[0]):
        if convolution.stride == (2, 2):
            convolution.stride = (stride, stride)


# Squeeze-and-excitation: Hu et al., arXiv 1709.01507, in the layout of Cadene's pretrained-models.pytorch.
BACKBONES: dict[str, Callable[..., Any]] = {
    "resnet18": partial(ResNetBackbone, resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": partial(ResNetBackbone, resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": partial(ResNetBackbone, resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": partial(ResNetBackbone, resnet.Bottleneck, [3, 4, 23, 3]),
    "resnet152": partial(ResNetBackbone, resnet.Bottleneck, [3, 8, 36, 3]),
    "se_resnet50": partial(_senet, "SEResNetBottleneck", (3, 4, 6, 3), 1),
    "se_resnet101": partial(_senet, "SEResNetBottleneck", (3, 4, 23, 3), 1),
    "se_resnet152": partial(_senet, "SEResNetBottleneck", (3, 8, 36, 3), 1),
    "se_resnext50": partial(_senet, "SEResNeXtBottleneck", (3, 4, 6, 3), 32),
    "se_resnext101": partial(_senet, "SEResNeXtBottleneck", (3, 4, 23, 3), 32),
    "senet154": partial(
        _senet,
        "SEBottleneck",
        (3, 8, 36, 3),
        64,
        inplanes=128,
        input_3x3=True,
        downsample_kernel_size=3,
        downsample_padding=1,
    ),
    "resnet50_ibn_a": partial(IBNBackbone, [3, 4, 6, 3]),
    "resnet101_ibn_a": partial(IBNBackbone, [3, 4, 23, 3]),
}


def validate_backbone(cfg: CfgNode) -> None:
    """Raise an error for an unknown backbone, or one that does not take images of these sizes.

    Raises:
        SettingsError: MODEL.NAME or a size of images is wrong.
    """
    if cfg.MODEL.NAME not in BACKBONES:
        timm_backbones.plan_for(cfg)


def build_backbone(cfg: CfgNode) -> tuple[Any, int]:
    """Return the backbone MODEL.NAME with random weights, and its number of features D.

    Its output is a feature map [B, D, h, w], or features [B, D] if it pools itself.
    """
    if cfg.MODEL.NAME not in BACKBONES:
        plan = timm_backbones.plan_for(cfg)
        return timm_backbones.build(plan), plan.num_features
    backbone = BACKBONES[cfg.MODEL.NAME](last_stride=cfg.MODEL.LAST_STRIDE, stem_relu=cfg.MODEL.STEM_RELU)
    return backbone, backbone.num_features


def normalization(cfg: CfgNode) -> tuple[Color, Color]:
    """Return mean and standard deviation of input pixels in 0..1: the settings', or else the backbone's."""
    mean, std = cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD
    if mean is None or std is None:
        default_mean, default_std = default_normalization(cfg.MODEL.NAME)
        return mean or default_mean, std or default_std
    return mean, std


def default_normalization(name: str) -> tuple[Color, Color]:
    """Return the mean and standard deviation that the backbone was pretrained with."""
    if name not in BACKBONES:
        return timm_backbones.normalization(name)
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
