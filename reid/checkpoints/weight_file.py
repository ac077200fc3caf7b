"""The checkpoint file that TEST.WEIGHT names, on disk or at W&B."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reid.checkpoints import weights
from reid.distributed import collectives
from reid.tracking import artifacts

if TYPE_CHECKING:
    from yacs.config import CfgNode


def is_at_wandb(cfg: CfgNode) -> bool:
    return bool(cfg.TEST.WEIGHT.startswith("wandb:"))


def read_weight(cfg: CfgNode) -> tuple[Path, dict[str, Any]]:
    """Return the file and its content; called by all ranks.

    A file at W&B is downloaded by rank 0 for all ranks: the others may not see its disk.

    Raises:
        SettingsError: TEST.WEIGHT is not the name of a checkpoint at W&B.
        WorldError: The file is missing or not a checkpoint, or W&B does not provide it.
    """
    if is_at_wandb(cfg):
        return collectives.from_rank_zero(lambda: read_weight_here(cfg))
    with collectives.errors_shared():
        return read_weight_here(cfg)


def read_weight_here(cfg: CfgNode) -> tuple[Path, dict[str, Any]]:
    """Return the file and its content on one process; a repeated call downloads nothing."""
    file = artifacts.fetch(cfg.TEST.WEIGHT, Path(cfg.OUTPUT_DIR)) if is_at_wandb(cfg) else Path(cfg.TEST.WEIGHT)
    return file, weights.read_file(file, "TEST.WEIGHT")
