"""ImageNet weights of the backbones: their file names, their folders and their URLs."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch

from reid.errors import WorldError

logger = logging.getLogger(__name__)


class WeightSource(NamedTuple):
    """Source of the weights of one backbone."""

    url: str
    also_called: tuple[str, ...] = ()  # other names of the same weights

    @property
    def files(self) -> tuple[str, ...]:
        return (self.url.rpartition("/")[2], *self.also_called)


_TORCHVISION = "https://download.pytorch.org/models"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download"
_IBN_NET = "https://github.com/XingangPan/IBN-Net/releases/download/v1.0"

# ResNets: torchvision's V1 weights, which the published figures rest on, under their new name and the one of 2019.
# SE networks: Cadene's weights, of which timm keeps copies.
SOURCES = {
    "resnet18": WeightSource(f"{_TORCHVISION}/resnet18-f37072fd.pth", ("resnet18-5c106cde.pth",)),
    "resnet34": WeightSource(f"{_TORCHVISION}/resnet34-b627a593.pth", ("resnet34-333f7ec4.pth",)),
    "resnet50": WeightSource(f"{_TORCHVISION}/resnet50-0676ba61.pth", ("resnet50-19c8e357.pth",)),
    "resnet101": WeightSource(f"{_TORCHVISION}/resnet101-63fe2227.pth", ("resnet101-5d3b4d8f.pth",)),
    "resnet152": WeightSource(f"{_TORCHVISION}/resnet152-394f9c45.pth", ("resnet152-b121ed2d.pth",)),
    "se_resnet50": WeightSource(f"{_TIMM}/v0.1-cadene/se_resnet50-ce0d4300.pth"),
    "se_resnet101": WeightSource(f"{_TIMM}/v0.1-cadene/se_resnet101-7e38fcc6.pth"),
    "se_resnet152": WeightSource(f"{_TIMM}/v0.1-cadene/se_resnet152-d17c99b7.pth"),
    "se_resnext50": WeightSource(
        f"{_TIMM}/v0.1-weights/legacy_se_resnext50_32x4d-f3651bad.pth", ("se_resnext50_32x4d-a260b3a4.pth",)
    ),
    "se_resnext101": WeightSource(
        f"{_TIMM}/v0.1-weights/legacy_se_resnext101_32x4d-37725eac.pth", ("se_resnext101_32x4d-3b2fe3d8.pth",)
    ),
    "senet154": WeightSource(f"{_TIMM}/v0.1-weights/legacy_senet154-e9eb9fe6.pth", ("senet154-c7b49a05.pth",)),
    "resnet50_ibn_a": WeightSource(f"{_IBN_NET}/resnet50_ibn_a-d9d0bb7b.pth"),
    "resnet101_ibn_a": WeightSource(f"{_IBN_NET}/resnet101_ibn_a-59ea0ac6.pth"),
}


def owner_of(file_name: str) -> str | None:
    """Return the backbone whose ImageNet weights have this file name, if any."""
    return next((name for name, source in SOURCES.items() if file_name in source.files), None)


def uses_cache(name: str, path: str) -> bool:
    """Return whether to use this machine's ImageNet weights: MODEL.PRETRAIN_PATH is '', or missing but has their name.

    Configurations of reid-strong-baseline name a file in the home of their author.

    Raises:
        WorldError: The path is missing, and its name is not that of the backbone's weights.
    """
    if not path or Path(path).exists():
        return not path
    owner = owner_of(Path(path).name)
    if owner == name:
        logger.warning("MODEL.PRETRAIN_PATH=%s does not exist; using this machine's copy of these weights", path)
        return True
    hint = f", whose name is that of the weights of {owner}" if owner else ""
    raise WorldError(
        f"MODEL.PRETRAIN_PATH must be a file with weights of {name}, got {path}, which does not exist{hint}. Fix: "
        f"correct the path, or set it to '' for the weights from {SOURCES[name].url}",
        key="MODEL.PRETRAIN_PATH",
    )


def find(name: str) -> Path | None:
    """Return the backbone's file on this machine, under any of its names, if there is one."""
    folders = (_folder(), Path.home() / ".cache" / "torch" / "checkpoints", Path.home() / ".torch" / "models")
    paths = (folder / file for folder in folders for file in SOURCES[name].files)
    return next((path for path in paths if path.is_file()), None)


def fetch(name: str) -> Path:
    """Return the backbone's file, downloading it if needed; called by one process of a node at a time.

    Raises:
        WorldError: The file is not on this machine and cannot be downloaded.
    """
    existing = find(name)
    if existing is not None:
        return existing
    url, path = SOURCES[name].url, _folder() / SOURCES[name].files[0]
    digits = re.search(r"-([0-9a-f]{8,})\.pth$", url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, os.fspath(path), digits and digits[1], progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: the checksum is wrong
        reason = error.reason if isinstance(error, URLError) else error
        raise WorldError(
            f"MODEL.PRETRAIN_CHOICE is imagenet, but the weights of {name} cannot be downloaded here ({reason}). Fix: "
            f"download {url} elsewhere and put it into {path.parent}, or set MODEL.PRETRAIN_PATH to the file, or train "
            "from scratch with MODEL.PRETRAIN_CHOICE none.",
            key="MODEL.PRETRAIN_CHOICE",
        ) from error
    return path


def _folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"
