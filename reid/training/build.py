"""Assembly of a training: the model with its first weights, then everything that one step needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from ignite.engine import Engine
from torch import nn

from reid.checkpoints import weights
from reid.data.preprocessing import BatchPreprocessor
from reid.distributed.accelerator import fix_gradient_buckets, move_model, wrap
from reid.distributed.sync_batchnorm import synchronize_batchnorm
from reid.models.reid_model import ReIDModel, build_model
from reid.training.criterion import Criterion
from reid.training.meters import TrainMeter
from reid.training.optim import build_optimizer
from reid.training.step import build_trainer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode


@dataclass(frozen=True)
class Training:
    """Everything that one training step needs, and the state that a checkpoint must hold.

    Attributes:
        model: Model without its wrapper, as checkpoints and evaluations use it.
        wrapped: The same model as training calls it.
        optimizer: Optimizer, wrapped by accelerate.
        scaler: Scaler of the loss under fp16; None otherwise.
        preprocessor: Preprocessing of the batches' images.
        trainer: Ignite engine of `build_trainer`.
        meter: Meter of the records, not attached yet.
    """

    model: ReIDModel
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    preprocessor: BatchPreprocessor
    trainer: Engine
    meter: TrainMeter


def build_initial_model(
    cfg: CfgNode, accelerator: Accelerator, num_pids: int, *, load_weights: bool = True
) -> ReIDModel:
    """Return the model of step 0 on its device, the same on all ranks; called by all ranks.

    Args:
        cfg: Complete configuration; MODEL, SEED, SOLVER.PRECISION and SOLVER.SYNC_BN are read.
        accelerator: Accelerator whose device the model moves to.
        num_pids: Number C of training identities.
        load_weights: Whether to load the weights that MODEL.PRETRAIN_CHOICE names; False where a checkpoint follows.

    Raises:
        SettingsError, WorldError: The weights are missing or do not fit.
    """
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, num_pids)
    if load_weights:
        weights.initialize(model, cfg)
    move_model(model, cfg, accelerator.device)
    if cfg.SOLVER.SYNC_BN:
        synchronize_batchnorm(model)
    return model


def build_training(
    cfg: CfgNode, accelerator: Accelerator, model: ReIDModel, preprocessor: BatchPreprocessor | None = None
) -> Training:
    """Wrap the model and assemble its training step; called by all ranks.

    Args:
        cfg: Complete configuration.
        accelerator: Accelerator that wraps model and optimizer.
        model: Model on its device, see `build_initial_model`.
        preprocessor: Preprocessing of the batches; by default that of batches which hold their images.
    """
    optimizer = build_optimizer(cfg.SOLVER, model)
    wrapped, optimizer = wrap(accelerator, model, optimizer, compiled=cfg.MODEL.COMPILE)
    fix_gradient_buckets(wrapped, cfg.INPUT.SIZE_TRAIN)
    preprocessor = preprocessor or BatchPreprocessor(cfg, accelerator.device)
    trainer = build_trainer(
        wrapped,
        Criterion(cfg),
        optimizer,
        accelerator,
        preprocessor,
        num_parts=cfg.SOLVER.ACCUMULATE,
        max_grad_norm=cfg.SOLVER.CLIP_GRAD_NORM,
    )
    meter = TrainMeter(log_period=cfg.SOLVER.LOG_PERIOD, batch_size=cfg.SOLVER.IMS_PER_BATCH, optimizer=optimizer)
    return Training(model, wrapped, optimizer, accelerator.scaler, preprocessor, trainer, meter)
