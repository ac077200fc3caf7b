"""State dicts in checkpoints, and the model that they belong to by their names and shapes."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor

# The ImageNet classifiers of torchvision's and Cadene's layouts, which none of our models has.
CLASSIFIERS = ("fc.", "last_linear.")

_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.")
# Type of the blocks -> their number in each of the four stages -> backbone.
_KINDS: dict[str, dict[tuple[int, ...], str]] = {
    "basic": {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"},
    "bottleneck": {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"},
    "ibn": {(3, 4, 6, 3): "resnet50_ibn_a", (3, 4, 23, 3): "resnet101_ibn_a"},
    "se": {(3, 4, 6, 3): "se_resnet50", (3, 4, 23, 3): "se_resnet101", (3, 8, 36, 3): "se_resnet152"},
    "se of 32 groups": {(3, 4, 6, 3): "se_resnext50", (3, 4, 23, 3): "se_resnext101"},
    "se of 64 groups": {(3, 8, 36, 3): "senet154"},
}
_SE_KINDS: dict[tuple[int, ...], str] = {(64, 64): "se", (128, 4): "se of 32 groups", (256, 2): "se of 64 groups"}


def inner(content: dict[str, Any]) -> Any:
    """Return the state dict of a checkpoint: under "model" (ours), under "state_dict", or the content itself."""
    if isinstance(content.get("state_dict"), dict):
        return content["state_dict"]
    return content.get("model", content)


def state_dict_of(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, ours or others', without the prefix "module."."""
    return {name.removeprefix("module."): value for name, value in inner(content).items() if isinstance(value, Tensor)}


def num_pids_of(content: dict[str, Any]) -> int:
    """Return the number of identities of the file's classifier; 1 without a classifier."""
    classifier = state_dict_of(content).get("classifier.weight")
    return len(classifier) if classifier is not None and classifier.dim() == 2 else 1


def checksum_of(content: dict[str, Any]) -> str:
    """Return a hash of all weights in the file, whatever else the file holds."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict_of(content).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def is_optimizer(content: dict[str, Any]) -> bool:
    """Return whether the content is the state dict of an optimizer."""
    return {"state", "param_groups"} <= content.keys()


def is_full_model(state: dict[str, Tensor]) -> bool:
    """Return whether the state dict is a full ReID model, not just a backbone."""
    return any(name.startswith("base.") for name in state)


def likely_backbone(state: dict[str, Tensor]) -> str | None:
    """Return the MODEL.NAME of a backbone's or a full model's state dict, if it is known."""
    shapes = {name.removeprefix("base."): tuple(value.shape) for name, value in state.items()}
    blocks = {(int(match[1]), int(match[2])) for name in shapes if (match := _BLOCK.match(name))}
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
    """Return N of a checkpoint that reid-strong-baseline called NAME_model_N.pth; 0 for another name."""
    match = re.fullmatch(r".+_model_(\d{1,6})\.pth", file_name)
    return int(match[1]) if match else 0
