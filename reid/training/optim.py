"""Parameter groups, the optimizer, and the learning rate as a pure function of the epoch."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reid.config.rules import FUSED

if TYPE_CHECKING:
    from yacs.config import CfgNode


def learning_rate(solver: CfgNode, epoch: int) -> float:
    """Return the learning rate of an epoch: warm-up, then steps.

    Example:
        >>> learning_rate(load_config().SOLVER, epoch=1)

    Args:
        solver: Section SOLVER; WARMUP_ITERS and STEPS are epochs.
        epoch: Epoch, counted from 1. The published schedule uses t = epoch - 1: with STEPS (40, 70) the rate falls
            after epochs 40 and 70.
    """
    t = epoch - 1
    factor = 1.0
    if t < solver.WARMUP_ITERS:
        constant = solver.WARMUP_METHOD == "constant"
        progress = 0.0 if constant else t / solver.WARMUP_ITERS
        factor = solver.WARMUP_FACTOR * (1 - progress) + progress
    rate: float = solver.BASE_LR * factor * solver.GAMMA ** bisect_right(solver.STEPS, t)
    return rate


def build_optimizer(solver: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer over two groups of trainable parameters: weights, and those with "bias" in their name.

    Each group keeps `lr_factor`, by which the schedule's learning rate is multiplied.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = [parameter for name, parameter in trainable.items() if "bias" not in name]
    biases = [parameter for name, parameter in trainable.items() if "bias" in name]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": solver.WEIGHT_DECAY, "lr_factor": 1.0},
        {"params": biases, "weight_decay": solver.WEIGHT_DECAY_BIAS, "lr_factor": solver.BIAS_LR_FACTOR},
    ]
    is_fused = solver.FUSED == "yes" or (solver.FUSED == "auto" and _may_be_fused(solver))
    optimizer_class = getattr(torch.optim, solver.OPTIMIZER_NAME)
    momentum = {"momentum": solver.MOMENTUM} if solver.OPTIMIZER_NAME == "SGD" else {}
    fused = {"fused": True} if is_fused else {}
    optimizer: torch.optim.Optimizer = optimizer_class(
        [group for group in groups if group["params"]], lr=solver.BASE_LR, **momentum, **fused
    )
    set_learning_rate(optimizer, learning_rate(solver, epoch=1))
    return optimizer


def _may_be_fused(solver: CfgNode) -> bool:
    """Return whether the fused step equals the plain one.

    Where the first step overflows under fp16, torch's fused SGD leaves its momentum uninitialized, and later steps use
    that memory (torch 2.11 to 2.15: `empty_like` in torch/optim/sgd.py, before the kernel that skips the step).
    """
    is_broken = solver.OPTIMIZER_NAME == "SGD" and solver.PRECISION == "fp16"
    return solver.OPTIMIZER_NAME in FUSED and not is_broken


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to the schedule's rate times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
