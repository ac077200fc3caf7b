"""Rules between settings: the losses and benchmark forms that they choose, and the combinations that are errors."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from reid.config.benchmark_names import BenchmarkOptions
from reid.errors import SettingsError

if TYPE_CHECKING:
    from yacs.config import CfgNode

_LABEL_SMOOTHING = 0.1  # fixed in reid-strong-baseline too
FUSED = ("Adam", "AdamW", "SGD")  # optimizers for which torch has a fused step on GPUs and CPUs

# ---- which losses ----
# As reid-strong-baseline composes them: without a center loss DATALOADER.SAMPLER chooses, with one METRIC_LOSS_TYPE.


def use_identity_loss(cfg: CfgNode) -> bool:
    return use_center_loss(cfg) or cfg.DATALOADER.SAMPLER != "triplet"


def use_triplet_loss(cfg: CfgNode) -> bool:
    if use_center_loss(cfg):
        return bool(cfg.MODEL.METRIC_LOSS_TYPE == "triplet_center")
    return bool(cfg.DATALOADER.SAMPLER != "softmax")


def use_center_loss(cfg: CfgNode) -> bool:
    return bool(cfg.MODEL.IF_WITH_CENTER)


def label_smoothing(cfg: CfgNode) -> float:
    """Return epsilon of the identity loss: 0 without smoothing, and where the published code omits it."""
    left_out = cfg.DATALOADER.SAMPLER == "softmax" and not use_center_loss(cfg) and not cfg.MODEL.SMOOTH_SOFTMAX
    return _LABEL_SMOOTHING if cfg.MODEL.IF_LABELSMOOTH and use_identity_loss(cfg) and not left_out else 0.0


# ---- which benchmarks ----


def benchmark_options(cfg: CfgNode) -> BenchmarkOptions:
    """Return the forms of the benchmarks that the DATASETS section chooses."""
    return BenchmarkOptions(
        market1501_distractors=cfg.DATASETS.MARKET1501.DISTRACTORS,
        msmt17_train=cfg.DATASETS.MSMT17.TRAIN,
        cuhk03_protocol=cfg.DATASETS.CUHK03.PROTOCOL,
        cuhk03_boxes=cfg.DATASETS.CUHK03.BOXES,
        cuhk03_split=cfg.DATASETS.CUHK03.SPLIT,
        vehicleid_test=cfg.DATASETS.VEHICLEID.TEST,
    )


# ---- combinations that are errors ----


def validate_combinations(cfg: CfgNode) -> None:
    """Raise an error for settings that contradict each other.

    Raises:
        SettingsError: It names the keys and values that would be allowed.
    """
    _validate_losses(cfg)
    _validate_batch(cfg)
    _validate_values(cfg)


def _validate_losses(cfg: CfgNode) -> None:
    metric_loss = cfg.MODEL.METRIC_LOSS_TYPE
    if use_center_loss(cfg) and metric_loss == "triplet":
        raise SettingsError(
            "MODEL.METRIC_LOSS_TYPE must be center or triplet_center when MODEL.IF_WITH_CENTER is yes, got triplet; "
            "use triplet_center, or MODEL.IF_WITH_CENTER no",
            key="MODEL.METRIC_LOSS_TYPE",
        )
    # SAMPLER softmax has no metric loss without a center loss, so there the type does not matter, as published.
    if not use_center_loss(cfg) and use_triplet_loss(cfg) and metric_loss != "triplet":
        raise SettingsError(
            f"MODEL.METRIC_LOSS_TYPE must be triplet when MODEL.IF_WITH_CENTER is no, got {metric_loss}; "
            "use triplet, or MODEL.IF_WITH_CENTER yes",
            key="MODEL.METRIC_LOSS_TYPE",
        )


def _validate_batch(cfg: CfgNode) -> None:
    if cfg.DATALOADER.SAMPLER == "softmax":  # draws images, not identities
        return
    batch, k = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE
    if use_triplet_loss(cfg) and k < 2:
        raise SettingsError(
            f"DATALOADER.NUM_INSTANCE must be at least 2 when there is a triplet loss, got {k}; use 4, as published",
            key="DATALOADER.NUM_INSTANCE",
        )
    least = 2 * k if use_triplet_loss(cfg) else k
    if batch % k:
        raise SettingsError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of DATALOADER.NUM_INSTANCE={k}, got {batch}; "
            f"use {multiples_around(batch, k, least)}",
            key="SOLVER.IMS_PER_BATCH",
        )
    if batch < least:
        raise SettingsError(
            f"SOLVER.IMS_PER_BATCH must hold at least 2 identities of DATALOADER.NUM_INSTANCE={k} images when there is "
            f"a triplet loss, got {batch}; use {least} or more",
            key="SOLVER.IMS_PER_BATCH",
        )


def _validate_values(cfg: CfgNode) -> None:
    if min(cfg.INPUT.SIZE_TRAIN) < cfg.INPUT.PADDING:
        raise SettingsError(
            f"INPUT.PADDING must not exceed the smaller side of INPUT.SIZE_TRAIN={tuple(cfg.INPUT.SIZE_TRAIN)}, got "
            f"{cfg.INPUT.PADDING}: crops would be black; use 10, as published",
            key="INPUT.PADDING",
        )
    if cfg.SOLVER.PRECISION == "fp16" and cfg.MODEL.DEVICE == "cpu":
        raise SettingsError(
            "SOLVER.PRECISION must be fp32, fp64 or bf16 when MODEL.DEVICE is cpu, got fp16; "
            "use fp32, or MODEL.DEVICE cuda",
            key="SOLVER.PRECISION",
        )
    if cfg.SOLVER.FUSED == "yes" and cfg.SOLVER.OPTIMIZER_NAME == "SGD" and cfg.SOLVER.PRECISION == "fp16":
        raise SettingsError(
            "SOLVER.FUSED must be auto or no when SOLVER.OPTIMIZER_NAME is SGD and SOLVER.PRECISION fp16, got yes: "
            "after an overflow in the first step torch's fused SGD computes with uninitialized memory; use auto",
            key="SOLVER.FUSED",
        )
    if cfg.SOLVER.FUSED == "yes" and cfg.SOLVER.OPTIMIZER_NAME not in FUSED:
        raise SettingsError(
            f"SOLVER.FUSED must be auto or no when SOLVER.OPTIMIZER_NAME is {cfg.SOLVER.OPTIMIZER_NAME}, for which "
            f"torch has no fused step on every device, got yes; use auto, or one of {', '.join(FUSED)}",
            key="SOLVER.FUSED",
        )
    if cfg.WANDB.ENABLE and cfg.WANDB.SYNC_TENSORBOARD and not cfg.LOG.TENSORBOARD:
        raise SettingsError(
            "WANDB.SYNC_TENSORBOARD must be no where there are no TensorBoard files to copy, got yes with "
            "LOG.TENSORBOARD no; use WANDB.SYNC_TENSORBOARD no, or LOG.TENSORBOARD yes",
            key="WANDB.SYNC_TENSORBOARD",
        )


def validate_training(cfg: CfgNode, num_ranks: int) -> None:
    """Raise an error for settings that no training can have; an evaluation with them is allowed.

    Raises:
        SettingsError: It names the keys and values that would be allowed.
    """
    _validate_pretraining(cfg)
    _validate_ranks(cfg, num_ranks)


def fitting_nodes(cfg: CfgNode, num_nodes: int, ranks_per_node: int) -> int:
    """Return the largest number of nodes, of those given, whose ranks can share the batches of a training evenly.

    Raises:
        SettingsError: Not even the ranks of one node can, or validate_training raises for another reason.
    """
    for number in range(num_nodes, 1, -1):
        with suppress(SettingsError):
            validate_training(cfg, number * ranks_per_node)
            return number
    validate_training(cfg, ranks_per_node)
    return 1


def _validate_pretraining(cfg: CfgNode) -> None:
    choice, path = cfg.MODEL.PRETRAIN_CHOICE, cfg.MODEL.PRETRAIN_PATH
    if choice in ("self", "finetune") and not path:
        raise SettingsError(
            f"MODEL.PRETRAIN_PATH must name a checkpoint when MODEL.PRETRAIN_CHOICE is {choice}, got ''; "
            "set it, or use MODEL.PRETRAIN_CHOICE imagenet",
            key="MODEL.PRETRAIN_PATH",
        )
    if choice == "none" and path:
        raise SettingsError(
            f"MODEL.PRETRAIN_PATH must be '' when MODEL.PRETRAIN_CHOICE is none, got {path!r}; "
            "use MODEL.PRETRAIN_CHOICE imagenet, self or finetune to start from the file",
            key="MODEL.PRETRAIN_PATH",
        )


def _validate_ranks(cfg: CfgNode, num_ranks: int) -> None:
    """Raise an error for a number of ranks that cannot share every global batch evenly.

    Raises:
        SettingsError: It names the batch sizes and numbers of ranks that would be allowed.
    """
    batch, k = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_INSTANCE
    if batch < 2:
        raise SettingsError(
            f"SOLVER.IMS_PER_BATCH must be at least 2, as BatchNorm needs, got {batch}; use 64",
            key="SOLVER.IMS_PER_BATCH",
        )
    if not cfg.SOLVER.SYNC_BN and batch < 2 * num_ranks:
        raise SettingsError(
            f"SOLVER.IMS_PER_BATCH must hold at least 2 images for each of {num_ranks} ranks when SOLVER.SYNC_BN is "
            f"no, as BatchNorm needs, got {batch}; use {2 * num_ranks} or more, or SOLVER.SYNC_BN yes",
            key="SOLVER.IMS_PER_BATCH",
        )
    _validate_micro_batches(cfg, num_ranks)
    if cfg.DATALOADER.SAMPLER == "softmax":
        size, shares, each = "", batch, 1
    else:  # a rank gets all K images of an identity
        size, shares, each = f" / DATALOADER.NUM_INSTANCE={k}", batch // k, k
    if shares % num_ranks:
        fitting = ", ".join(str(ranks) for ranks in range(1, shares + 1) if shares % ranks == 0)
        batches = multiples_around(batch, each * num_ranks, each * num_ranks)
        raise SettingsError(
            f"SOLVER.IMS_PER_BATCH={batch}{size} must be a multiple of the number of ranks, got {shares} on "
            f"{num_ranks} ranks; use SOLVER.IMS_PER_BATCH {batches}, or one of {fitting} ranks",
            key="SOLVER.IMS_PER_BATCH",
        )


def _validate_micro_batches(cfg: CfgNode, num_ranks: int) -> None:
    batch, num_micro = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    if num_micro == 1:
        return
    if batch % (num_ranks * num_micro):
        raise SettingsError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the number of ranks ({num_ranks}) times SOLVER.ACCUMULATE="
            f"{num_micro}, got {batch}; use {multiples_around(batch, num_ranks * num_micro, num_ranks * num_micro)}",
            key="SOLVER.IMS_PER_BATCH",
        )
    num_normalized = batch // num_micro // (1 if cfg.SOLVER.SYNC_BN else num_ranks)
    if num_normalized < 2:
        raise SettingsError(
            f"SOLVER.ACCUMULATE must leave at least 2 images for BatchNorm to normalize over, got {num_micro} with "
            f"SOLVER.IMS_PER_BATCH={batch} on {num_ranks} ranks; lower SOLVER.ACCUMULATE",
            key="SOLVER.ACCUMULATE",
        )


def multiples_around(value: int, step: int, least: int) -> str:
    """Return the multiples of `step` next to `value` that are not below `least`."""
    below = value // step * step
    return f"{below} or {below + step}" if below >= least else str(max(below + step, least))
