"""What is found out before a run builds anything."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from reid.config.load import by_full_key
from reid.distributed import collectives
from reid.models import backbones
from reid.runs.directory import commit, source_fingerprint

if TYPE_CHECKING:
    from yacs.config import CfgNode


def check_start(cfg: CfgNode) -> None:
    """What would be found out late: ranks that differ, and a backbone that there is not."""
    collectives.require_same_on_all_ranks(_facts(cfg))
    with collectives.errors_shared():
        backbones.validate_backbone(cfg)


def _facts(cfg: CfgNode) -> dict[str, object]:
    """What must be the same on all ranks; each node may have data and caches in folders of its own."""
    own_folders = ("DATASETS.ROOT_DIR", "DATASETS.CACHE_DIR", "DATASETS.NODE_LOCAL_DIR")
    settings = {key: value for key, value in by_full_key(cfg).items() if key not in own_folders}
    return settings | {
        **{name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "numpy")},
        "the commit of reid": commit(),
        "the source code of reid": source_fingerprint(),
    }
