"""The stories: train and evaluate; each builds, wires and runs, called by all ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reid import distributed, weights
from reid.checkpoint_files import checkpoints_in
from reid.criterion import Criterion
from reid.data.loaders import TrainData, build_stores, build_train_data
from reid.data.sets import DataSets, open_data_sets
from reid.data.splits import Benchmark
from reid.engine import Preparation, build_trainer
from reid.errors import SettingsError, shared
from reid.evaluation import Evaluators, Scores, report_queries
from reid.handlers import artifacts, console, guards, interruption, schedule
from reid.handlers.checkpoint import Checkpoints
from reid.handlers.meters import TrainMeter
from reid.handlers.pictures import Pictures
from reid.handlers.records import Progress, attach_rows, score_numbers, summary_of_all
from reid.handlers.tensorboard import TensorBoard
from reid.handlers.tracking import Tracker
from reid.handlers.watchdog import Watchdog
from reid.layouts import epoch_in_name
from reid.model import ReIDModel, build_model
from reid.optim import build_optimizer
from reid.ownership import claim
from reid.preemption import Preempted, Signals
from reid.run_directory import RunDirectory, environment_facts
from reid.start import check_start
from reid.sync_batchnorm import synchronise_batchnorm
from reid.trained import read_trained
from reid.weight_file import is_at_wandb
from reid.world import read_start, slurm_job
from reid.wrapping import place, settle_gradient_buckets, wrap

if TYPE_CHECKING:
    from accelerate import Accelerator
    from ignite.engine import Engine
    from yacs.config import CfgNode

logger = logging.getLogger("reid.run")


def train(cfg: CfgNode, accelerator: Accelerator, signals: Signals) -> None:
    """Trains from the newest checkpoint in OUTPUT_DIR, or from the start, to SOLVER.MAX_EPOCHS.

    Raises:
        Preempted: on all ranks, when a signal came; all is saved.
    """
    check_start(cfg)
    folder = RunDirectory(Path(cfg.OUTPUT_DIR))
    ownership = claim(folder, read_start(os.environ))
    data = open_data(cfg, train=True)
    model = _new_model(cfg, accelerator, data.num_train_pids, folder)  # first, as its weights may be missing
    train_data, dataset = _decode(cfg, data, accelerator.device), data.fingerprint_of_training()

    wrapped, optimizer = wrap(accelerator, model, build_optimizer(cfg.SOLVER, model), compiled=cfg.MODEL.COMPILE)
    settle_gradient_buckets(wrapped, cfg.INPUT.SIZE_TRAIN)

    trainer = build_trainer(
        wrapped,
        Criterion(cfg),
        optimizer,
        accelerator,
        Preparation(cfg, accelerator.device, train_data.on_device),
        num_parts=cfg.SOLVER.ACCUMULATE,
        max_grad_norm=cfg.SOLVER.CLIP_GRAD_NORM,
    )
    watchdog, progress = Watchdog(cfg.SOLVER.TIMEOUT_MINUTES), Progress()
    tracker, tensorboard = _build_tracker(cfg, folder, data.train, dataset), TensorBoard(cfg, folder.path)
    pictures = Pictures(cfg, folder.pictures, data, tracker.show)
    evaluator = Evaluators(
        data,
        model,
        accelerator,
        cfg,
        on_scored=pictures.compare,
        beat=watchdog.beat,
        is_stopped=signals.were_received,
    )
    evaluations = schedule.Evaluations(evaluator.run, progress, cfg.SOLVER)
    meter = TrainMeter(log_period=cfg.SOLVER.LOG_PERIOD, batch_size=cfg.SOLVER.IMS_PER_BATCH, optimizer=optimizer)
    checkpoints = Checkpoints(
        folder.checkpoints,
        model,
        optimizer,
        progress,
        cfg,
        dataset,
        meter=meter,
        scaler=accelerator.scaler,
        on_saved=tracker.keep_checkpoint,
        check=ownership.check,
    )

    # Each line is one effect. Where two share an event, the upper one acts first: evaluate, keep the best, write it
    # down, save.
    watchdog.attach(trainer)
    schedule.set_learning_rate_by_epoch(trainer, optimizer, cfg.SOLVER)
    schedule.place_sampler(trainer, train_data.batches)
    schedule.train_mode_by_epoch(trainer, wrapped)
    guards.check_first_batch(trainer, cfg)
    meter.attach(trainer)
    evaluations.attach(trainer)
    ownership.attach(trainer)
    checkpoints.attach(trainer)
    console.attach(trainer, folder, progress)
    attach_rows(trainer, progress, tracker.log_row)
    attach_rows(trainer, progress, tensorboard.log_row)
    pictures.attach(trainer, progress, train_data)
    interruption.save_and_stop_when_asked(trainer, checkpoints, signals)

    _find_place(trainer, checkpoints, cfg, len(train_data.loader))
    folder.go_on_from(trainer.state.iteration, progress.last["iteration"] if progress.last else 0)
    num_steps = cfg.SOLVER.MAX_EPOCHS * len(train_data.loader)
    if trainer.state.iteration >= num_steps and not evaluations.is_missing(trainer):
        logger.info("all %d epochs are done; raise SOLVER.MAX_EPOCHS to go on", cfg.SOLVER.MAX_EPOCHS)
        return
    _announce(cfg, accelerator, model, train_data, folder)
    with tracker.training(progress), tensorboard.running(trainer), watchdog.watching(), signals.deferred():
        _run(trainer, train_data, num_steps, evaluations, checkpoints, folder)
    _report_end(folder, progress, evaluator, evaluations.scores)


def _find_place(trainer: Engine, checkpoints: Checkpoints, cfg: CfgNode, epoch_length: int) -> None:
    """Where the run goes on: at its newest checkpoint, or behind the epoch of one of reid-strong-baseline's."""
    if checkpoints.resume(trainer) or cfg.MODEL.PRETRAIN_CHOICE != "self":
        return
    epoch = epoch_in_name(Path(cfg.MODEL.PRETRAIN_PATH).name)
    if epoch:
        logger.info(
            "MODEL.PRETRAIN_CHOICE self: going on behind epoch %d, as %s says, with a new optimiser",
            *(epoch, Path(cfg.MODEL.PRETRAIN_PATH).name),
        )
        max_epochs = max(cfg.SOLVER.MAX_EPOCHS, epoch)  # Ignite wants no less
        trainer.load_state_dict({"epoch": epoch, "epoch_length": epoch_length, "max_epochs": max_epochs})


def _build_tracker(cfg: CfgNode, folder: RunDirectory, used: Sequence[Benchmark], fingerprint: str) -> Tracker:
    facts = environment_facts() | {"slurm": slurm_job(os.environ), "dataset": fingerprint}
    return Tracker(cfg, folder.path, facts, [benchmark.name for benchmark in used])


def _run(
    trainer: Engine,
    train_data: TrainData,
    num_steps: int,
    evaluations: schedule.Evaluations,
    checkpoints: Checkpoints,
    folder: RunDirectory,
) -> None:
    """From where the run stands to its end or to a signal, until all is on the disk."""
    try:
        if evaluations.is_missing(trainer):
            evaluations.run(trainer)
            checkpoints.save(trainer)
        if trainer.state.iteration < num_steps:  # Ignite would start a finished run anew
            epoch_length = len(train_data.loader)
            trainer.run(train_data.loader, max_epochs=num_steps // epoch_length, epoch_length=epoch_length)
    except Preempted:
        checkpoints.save(trainer)
        checkpoints.finish()
        folder.finish()
        folder.leave_marker(f"saved after iteration {trainer.state.iteration}")
        raise
    checkpoints.finish()
    folder.finish()


def open_data(cfg: CfgNode, *, train: bool) -> DataSets:
    """The benchmarks, the same on all ranks."""
    data = open_data_sets(cfg, train=train)
    distributed.agree(
        {
            "the fingerprint of the training images": data.fingerprint_of_training(),
            "the fingerprint of the test images": data.fingerprint_of_tests(),
        },
        key="DATASETS.ROOT_DIR",
    )
    return data


def _report_end(folder: RunDirectory, progress: Progress, evaluator: Evaluators, scores: Scores) -> None:
    """After training: the latest scores in detail, where this process has evaluated, and the best ones."""
    report_queries(folder, evaluator.data, scores)
    assert progress.best is not None  # the last epoch is evaluated
    console.report_test_sets(progress.best)
    best = progress.best
    logger.info("best mAP %.1f %% after epoch %d; all is in %s", 100 * best["mAP"], best["epoch"], folder.path)


def _decode(cfg: CfgNode, data: DataSets, device: torch.device) -> TrainData:
    build_stores(cfg, data)
    return build_train_data(cfg, data.train, device)


def evaluate(cfg: CfgNode, accelerator: Accelerator, signals: Signals) -> None:
    """Evaluates the checkpoint TEST.WEIGHT and writes result.json and per_query.csv."""
    del signals  # there is nothing to save: the first one ends it
    check_start(cfg)
    if not cfg.TEST.WEIGHT:
        found = checkpoints_in(Path(cfg.OUTPUT_DIR) / "checkpoints", "best")
        remedy = f"the best of this run is {found[-1]}" if found else "add TEST.WEIGHT FILE to the command"
        raise shared(
            SettingsError(f"TEST.WEIGHT must name the checkpoint to evaluate, got ''; {remedy}", key="TEST.WEIGHT")
        )
    trained = read_trained(cfg, accelerator)
    folder = RunDirectory(Path(cfg.OUTPUT_DIR))
    data = open_data(cfg, train=False)
    build_stores(cfg, data)
    watchdog = Watchdog(cfg.SOLVER.TIMEOUT_MINUTES)
    tracker = _build_tracker(cfg, folder, data.test, data.fingerprint_of_tests())
    pictures = Pictures(cfg, folder.pictures, data, tracker.show)
    evaluator = Evaluators(data, trained.model, accelerator, cfg, on_scored=pictures.compare, beat=watchdog.beat)
    epoch = trained.content.get("epoch")
    epoch = epoch if isinstance(epoch, int) else None  # others may have anything there
    with tracker.evaluation(), watchdog.watching():
        fetched_from = cfg.TEST.WEIGHT.removeprefix("wandb:") if is_at_wandb(cfg) else ""
        tracker.use_checkpoint(trained.file, fetched_from or artifacts.reference_of(trained.content))
        scores = evaluator.run()
        summary = summary_of_all(scores)
        pictures.draw(Path(cfg.TEST.WEIGHT).name, None, epoch)
        tracker.log_row("test", score_numbers(summary), None, epoch)
    result: dict[str, Any] = {"epoch": epoch, **summary, "weight": cfg.TEST.WEIGHT}
    if distributed.is_main():
        folder.write_result(result)
    for line in console.describe_scores(summary):
        logger.info("%s: %s", cfg.TEST.WEIGHT, line)
    report_queries(folder, evaluator.data, scores)
    console.report_test_sets(summary)


def _new_model(cfg: CfgNode, accelerator: Accelerator, num_pids: int, folder: RunDirectory) -> ReIDModel:
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, num_pids)
    if not distributed.on_main(lambda: checkpoints_in(folder.checkpoints, "last")):  # else all weights come from there
        weights.initialise(model, cfg)
    place(model, cfg, accelerator)
    if cfg.SOLVER.SYNC_BN:
        synchronise_batchnorm(model)
    return model


def _announce(
    cfg: CfgNode, accelerator: Accelerator, model: ReIDModel, train_data: TrainData, folder: RunDirectory
) -> None:
    folder.describe(cfg, accelerator.device)
    logger.info(
        "training %s (%.1f million parameters) on %d x %s: %d identities, %d steps of %d images an epoch, %d epochs",
        cfg.MODEL.NAME,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        distributed.num_ranks(),
        accelerator.device.type,
        train_data.num_pids,
        len(train_data.loader),
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.MAX_EPOCHS,
    )
