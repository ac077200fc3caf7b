"""Trunks that turn images into feature maps, under the published parameter names; a plain dict by name."""

from __future__ import annotations

from collections.abc import Callable
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
        layers: blocks in each of the four stages.
        last_stride: of the last stage, 1 or 2.
        stem_relu: whether a ReLU follows the first BatchNorm; the published models lack it.
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
        """Images [B, 3, H, W] to a feature map [B, num_features, h, w], of 1/16 the size (last stride 1) or 1/32."""
        x = self.bn1(self.conv1(images))
        if self.stem_relu:
            x = self.relu(x)
        x = self.maxpool(x)
        feature_map: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return feature_map


class IBN(nn.Module):
    """InstanceNorm of the first half of the channels, BatchNorm of the others.

    Args:
        num_channels: of both halves.

    Source: Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, arXiv 1807.09441.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_instance_normed = num_channels // 2
        self.IN = nn.InstanceNorm2d(self.num_instance_normed, affine=True)  # named as in published files
        self.BN = nn.BatchNorm2d(num_channels - self.num_instance_normed)

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_channels, h, w] to the same shape."""
        first, others = x.tensor_split([self.num_instance_normed], dim=1)
        return torch.cat([self.IN(first), self.BN(others)], dim=1)


class IBNBackbone(ResNetBackbone):
    """ResNet-IBN-a: the first norm of every block of the first three stages is an `IBN`; the stem has its ReLU."""

    def __init__(self, layers: list[int], *, last_stride: int) -> None:
        super().__init__(resnet.Bottleneck, layers, last_stride=last_stride, stem_relu=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                block.bn1 = IBN(block.conv1.out_channels)
        # Published checkpoints carry the ImageNet classifier, which plays no part. Kept as they have it, and frozen, as
        # no loss reaches it.
        self.fc = nn.Linear(self.num_features, 1000).requires_grad_(requires_grad=False)


def _set_last_stride(trunk: Any, stride: int) -> None:
    """Where the last stage's first block has its stride: in its 3x3 convolution, or, as in Caffe, in its first one."""
    first = trunk.layer4[0]
    for convolution in (first.conv1, first.conv2, first.downsample[0]):
        if convolution.stride == (2, 2):
            convolution.stride = (stride, stride)


def _resnet(block: type[resnet.BasicBlock | resnet.Bottleneck], layers: list[int]) -> Callable[..., nn.Module]:
    def build(*, last_stride: int, stem_relu: bool) -> ResNetBackbone:
        return ResNetBackbone(block, layers, last_stride=last_stride, stem_relu=stem_relu)

    return build


def _ibn(layers: list[int]) -> Callable[..., nn.Module]:
    def build(*, last_stride: int, stem_relu: bool) -> IBNBackbone:
        del stem_relu  # it always has the ReLU
        return IBNBackbone(layers, last_stride=last_stride)

    return build


def _senet(block: str, layers: tuple[int, ...], *, groups: int, **stem: Any) -> Callable[..., nn.Module]:
    def build(*, last_stride: int, stem_relu: bool) -> nn.Module:
        from timm.models import senet  # takes seconds, and most runs do without it

        del stem_relu  # it always has the ReLU
        without_head: dict[str, Any] = {"num_classes": 0, "global_pool": "", "drop_rate": 0}
        trunk = senet.SENet(getattr(senet, block), layers, groups=groups, reduction=16, **without_head, **stem)
        _set_last_stride(trunk, last_stride)
        return trunk

    return build


# Squeeze-and-excitation: Hu et al., arXiv 1709.01507, in the layout of Cadene's pretrained-models.pytorch.
BACKBONES: dict[str, Callable[..., Any]] = {
    "resnet18": _resnet(resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": _resnet(resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": _resnet(resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": _resnet(resnet.Bottleneck, [3, 4, 23, 3]),
    "resnet152": _resnet(resnet.Bottleneck, [3, 8, 36, 3]),
    "se_resnet50": _senet("SEResNetBottleneck", (3, 4, 6, 3), groups=1),
    "se_resnet101": _senet("SEResNetBottleneck", (3, 4, 23, 3), groups=1),
    "se_resnet152": _senet("SEResNetBottleneck", (3, 8, 36, 3), groups=1),
    "se_resnext50": _senet("SEResNeXtBottleneck", (3, 4, 6, 3), groups=32),
    "se_resnext101": _senet("SEResNeXtBottleneck", (3, 4, 23, 3), groups=32),
    "senet154": _senet(
        "SEBottleneck",
        (3, 8, 36, 3),
        groups=64,
        inplanes=128,
        input_3x3=True,
        downsample_kernel_size=3,
        downsample_padding=1,
    ),
    "resnet50_ibn_a": _ibn([3, 4, 6, 3]),
    "resnet101_ibn_a": _ibn([3, 4, 23, 3]),
}


def validate_backbone(cfg: CfgNode) -> None:
    """Refuses a backbone that there is not, or that does not take images of these sizes.

    Raises:
        SettingsError: naming what would do.
    """
    if cfg.MODEL.NAME not in BACKBONES:
        timm_backbones.plan_for(cfg)


def build_backbone(cfg: CfgNode) -> tuple[Any, int]:
    """The trunk that MODEL.NAME names, with randomly initialised weights, and its number of features D.

    It gives a feature map [B, D, h, w], or features [B, D] where it pools itself.
    """
    if cfg.MODEL.NAME not in BACKBONES:
        plan = timm_backbones.plan_for(cfg)
        return timm_backbones.build(plan), plan.num_features
    trunk = BACKBONES[cfg.MODEL.NAME](last_stride=cfg.MODEL.LAST_STRIDE, stem_relu=cfg.MODEL.STEM_RELU)
    return trunk, trunk.num_features


def normalization(cfg: CfgNode) -> tuple[Color, Color]:
    """Mean and standard deviation of the backbone's input, of pixels in 0..1: as set, or else the backbone's own."""
    mean, std = cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD
    own_mean, own_std = default_normalization(cfg.MODEL.NAME) if mean is None or std is None else (mean, std)
    return own_mean if mean is None else mean, own_std if std is None else std


def default_normalization(name: str) -> tuple[Color, Color]:
    """Mean and standard deviation that the backbone's pretrained weights want."""
    if name not in BACKBONES:
        return timm_backbones.normalization(name)
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
