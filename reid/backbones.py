"""Trunks that turn images into feature maps; a plain dict by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torchvision.models import resnet


class ResNetTrunk(resnet.ResNet):  # type: ignore[misc]  # torchvision ships no types
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
        first = self.layer4[0]
        strided = first.conv2 if isinstance(first, resnet.Bottleneck) else first.conv1
        strided.stride = first.downsample[0].stride = (last_stride, last_stride)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to a feature map [B, num_features, h, w], of 1/16 the size (last stride 1) or 1/32."""
        x = self.bn1(self.conv1(images))
        if self.stem_relu:
            x = self.relu(x)
        x = self.maxpool(x)
        feature_map: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return feature_map


def _resnet(block: type[resnet.BasicBlock | resnet.Bottleneck], layers: list[int]) -> Callable[..., ResNetTrunk]:
    def build(*, last_stride: int, stem_relu: bool) -> ResNetTrunk:
        return ResNetTrunk(block, layers, last_stride=last_stride, stem_relu=stem_relu)

    return build


BACKBONES: dict[str, Callable[..., ResNetTrunk]] = {
    "resnet18": _resnet(resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": _resnet(resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": _resnet(resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": _resnet(resnet.Bottleneck, [3, 4, 23, 3]),
    "resnet152": _resnet(resnet.Bottleneck, [3, 8, 36, 3]),
}

# The ImageNet weights (V1, which the published numbers rest on) that torchvision fetches where the machine may.
IMAGENET_WEIGHTS: dict[str, resnet.WeightsEnum] = {
    "resnet18": resnet.ResNet18_Weights.IMAGENET1K_V1,
    "resnet34": resnet.ResNet34_Weights.IMAGENET1K_V1,
    "resnet50": resnet.ResNet50_Weights.IMAGENET1K_V1,
    "resnet101": resnet.ResNet101_Weights.IMAGENET1K_V1,
    "resnet152": resnet.ResNet152_Weights.IMAGENET1K_V1,
}
