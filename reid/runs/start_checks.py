"""Checks before a run builds anything."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from reid.config.load import by_full_key
from reid.distributed import collectives
from reid.models import backbones
from reid.runs.directory import commit, source_fingerprint

if TYPE_CHECKING:
    from yacs.config import CfgNode

_OF_EACH_NODE = ("DATASETS.ROOT_DIR", "DATASETS.CACHE_DIR", "DATASETS.NODE_LOCAL_DIR")  # may differ between nodes


def check_start(cfg: CfgNode) -> None:
    """Raise if the ranks differ in settings, packages or code, or if the backbone does not exist."""
    facts: dict[str, object] = {key: value for key, value in by_full_key(cfg).items() if key not in _OF_EACH_NODE}
    facts |= {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "numpy")}
    facts |= {"the commit of reid": commit(), "the source code of reid": source_fingerprint()}
    collectives.require_same_on_all_ranks(facts)
    with collectives.errors_shared():
        backbones.validate_backbone(cfg)
