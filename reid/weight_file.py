"""The file that TEST.WEIGHT names, on the disk or at W&B."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reid import distributed, weights
from reid.handlers import artifacts

if TYPE_CHECKING:
    from yacs.config import CfgNode


def is_at_wandb(cfg: CfgNode) -> bool:
    return bool(cfg.TEST.WEIGHT.startswith("wandb:"))


def read_weight(cfg: CfgNode) -> tuple[Path, dict[str, Any]]:
    """The file and what is in it; called by all ranks.

    One at W&B is fetched by rank 0 for all: the others may not see its disk, and the server shall be asked once.

    Raises:
        SettingsError: TEST.WEIGHT is no name of a checkpoint at W&B.
        WorldError: the file is missing, no such file, or W&B does not give it.
    """
    choose = distributed.on_main if is_at_wandb(cfg) else distributed.together
    return choose(lambda: read_weight_here(cfg))


def read_weight_here(cfg: CfgNode) -> tuple[Path, dict[str, Any]]:
    """The same on one process; the second time nothing is fetched."""
    file = artifacts.fetch(cfg.TEST.WEIGHT, Path(cfg.OUTPUT_DIR)) if is_at_wandb(cfg) else Path(cfg.TEST.WEIGHT)
    return file, weights.read_file(file, "TEST.WEIGHT")
