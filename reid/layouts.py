"""What the names and shapes in a file of weights say of the model that they belong to."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

# In files, but in no model of ours: the ImageNet classifiers of torchvision's and Cadene's layouts.
CLASSIFIERS = ("fc.", "last_linear.")

_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.")
_KINDS: dict[
    str, dict[tuple[int, ...], str]
] = {  # blocks in each of the four stages -> backbone, by what the blocks are
    "basic": {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"},
    "bottleneck": {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"},
    "ibn": {(3, 4, 6, 3): "resnet50_ibn_a", (3, 4, 23, 3): "resnet101_ibn_a"},
    "se": {(3, 4, 6, 3): "se_resnet50", (3, 4, 23, 3): "se_resnet101", (3, 8, 36, 3): "se_resnet152"},
    "se of 32 groups": {(3, 4, 6, 3): "se_resnext50", (3, 4, 23, 3): "se_resnext101"},
    "se of 64 groups": {(3, 8, 36, 3): "senet154"},
}
_SE_KINDS: dict[tuple[int, ...], str] = {(64, 64): "se", (128, 4): "se of 32 groups", (256, 2): "se of 64 groups"}


def inner(content: dict[str, Any]) -> Any:
    """What stands where checkpoints have their state dict, ours under "model", others' under "state_dict"."""
    if isinstance(content.get("state_dict"), dict):
        return content["state_dict"]
    return content.get("model", content)


def is_optimizer(content: dict[str, Any]) -> bool:
    return {"state", "param_groups"} <= content.keys()


def holds_whole_model(state: dict[str, Tensor]) -> bool:
    """Rather than a backbone alone."""
    return any(name.startswith("base.") for name in state)


def likely_backbone(state: dict[str, Tensor]) -> str | None:
    """The MODEL.NAME that the state dict, of a backbone or a whole model, belongs to; None where it cannot be told."""
    shapes = {name.removeprefix("base."): tuple(value.shape) for name, value in state.items()}
    blocks = {(int(found[1]), int(found[2])) for name in shapes if (found := _BLOCK.match(name))}
    depths = tuple(len([stage for stage, _ in blocks if stage == wanted]) for wanted in range(1, 5))
    return _KINDS.get(_kind_of_block(shapes), {}).get(depths)


def _kind_of_block(shapes: dict[str, tuple[int, ...]]) -> str:
    middle = shapes.get("layer1.0.conv2.weight", ())[:2]
    if "layer1.0.se_module.fc1.weight" in shapes:
        return _SE_KINDS.get(middle, "")
    if middle != (64, 64):
        return ""
    if "layer1.0.bn1.IN.weight" in shapes:
        return "ibn"
    return "bottleneck" if "layer1.0.conv3.weight" in shapes else "basic"


def epoch_in_name(file_name: str) -> int:
    """N of a checkpoint that reid-strong-baseline has called NAME_model_N.pth; 0 of a file of another name."""
    found = re.fullmatch(r".+_model_(\d{1,6})\.pth", file_name)
    return int(found[1]) if found else 0
