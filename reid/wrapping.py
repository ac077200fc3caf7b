"""Precision and wrapping for training, by accelerate, joined to the process group that stands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import nn

from reid.errors import SettingsError

if TYPE_CHECKING:
    from yacs.config import CfgNode


def build_accelerator(cfg: CfgNode, *, on_gpu: bool, num_ranks: int) -> Accelerator:
    """The owner of precision, wrapping and the backward pass.

    Args:
        cfg: the whole configuration; SOLVER.PRECISION is read.
        on_gpu: of this run.
        num_ranks: of this run.

    Raises:
        SettingsError: accelerate would silently ignore a setting on a CPU.
    """
    precision = cfg.SOLVER.PRECISION
    if precision == "fp16" and not on_gpu:
        raise SettingsError("SOLVER.PRECISION fp16 needs a GPU, and this run is on a CPU; use fp32 or bf16")
    # Without it accelerate sets the number of threads itself, with a warning; torch has set them already.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision="no" if precision in ("fp32", "fp64") else precision,
        # Micro-batches are the engine's own: accelerate knows no loss over several of them.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def wrap(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimiser as training uses them; accelerate would shard a loader again and step a schedule W times."""
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        # BatchNorm statistics are equal on all ranks (SyncBN), or broadcast before an evaluation; centers are equal.
        # Set here, as the name of the argument depends on torch's version.
        wrapped.broadcast_buffers = False
    return wrapped, optimizer
