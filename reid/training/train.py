"""The run of a training: open the data, build, attach what acts on each event, resume, train, report."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Engine

from reid.checkpoints.save import checkpoints_in
from reid.checkpoints.state_dicts import epoch_in_name
from reid.data.datasets import DataSets, open_data_sets
from reid.data.loaders import TrainData, build_stores, build_train_data
from reid.data.preprocessing import BatchPreprocessor
from reid.distributed import collectives
from reid.distributed.launch_environment import read_start, slurm_job
from reid.distributed.watchdog import Watchdog
from reid.evaluation.evaluator import EvaluatorGroup, report_queries
from reid.evaluation.ranked_galleries import Pictures
from reid.models.reid_model import ReIDModel
from reid.process.signals import Preempted, Signals
from reid.runs.directory import RunDirectory, environment_facts
from reid.runs.ownership import claim
from reid.runs.progress import Progress, attach_rows
from reid.runs.start_checks import check_start
from reid.tracking.tensorboard import TensorBoard
from reid.tracking.tracker import Tracker
from reid.training import console, guards, interruption, schedule
from reid.training.build import Training, build_initial_model, build_training
from reid.training.checkpointing import Checkpoints
from reid.training.meters import TrainMeter

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)


def train(cfg: CfgNode, accelerator: Accelerator, signals: Signals) -> dict[str, Any]:
    """Train from the newest checkpoint in OUTPUT_DIR, or from the start, to SOLVER.MAX_EPOCHS; called by all ranks.

    Returns:
        The scores of the last evaluation, as in result.json, and under "best" those of the best one.

    Raises:
        Preempted: On all ranks, after a signal; everything is saved.
    """
    check_start(cfg)
    folder = RunDirectory(Path(cfg.OUTPUT_DIR))
    ownership = claim(folder, read_start(os.environ))
    data = open_data_sets(cfg, train=True)
    training, train_data = _build(cfg, accelerator, folder, data)
    trainer, model, optimizer = training.trainer, training.model, training.optimizer

    fingerprint = data.fingerprint_of_training()
    watchdog, progress = Watchdog(cfg.SOLVER.TIMEOUT_MINUTES), Progress()
    tracker = build_tracker(cfg, folder, [benchmark.name for benchmark in data.train], fingerprint)
    tensorboard = TensorBoard(cfg, folder.path)
    pictures = Pictures(cfg, folder.pictures, data, tracker.show)
    evaluator = EvaluatorGroup(
        data,
        model,
        accelerator,
        cfg,
        on_scored=pictures.compare,
        beat=watchdog.beat,
        is_stopped=signals.were_received,
    )
    evaluations = schedule.EvaluationSchedule(evaluator.run, progress, cfg.SOLVER)
    meter = TrainMeter(log_period=cfg.SOLVER.LOG_PERIOD, batch_size=cfg.SOLVER.IMS_PER_BATCH, optimizer=optimizer)
    checkpoints = Checkpoints(
        folder.checkpoints,
        model,
        optimizer,
        progress,
        cfg,
        fingerprint,
        meter=meter,
        scaler=accelerator.scaler,
        on_saved=tracker.keep_checkpoint,
        check=ownership.check,
    )

    # Where two act on the same event, the upper one is first: evaluate, keep the best, write records, save.
    watchdog.attach(trainer)
    schedule.set_learning_rate_by_epoch(trainer, optimizer, cfg.SOLVER)
    schedule.set_sampler_position(trainer, train_data.batches)
    schedule.train_mode_by_epoch(trainer, training.wrapped)
    guards.check_first_batch(trainer, cfg)
    meter.attach(trainer)
    evaluations.attach(trainer)
    ownership.attach(trainer)
    checkpoints.attach(trainer)
    console.attach(trainer, folder, progress)
    attach_rows(trainer, progress, tracker.log_row)
    attach_rows(trainer, progress, tensorboard.log_row)
    pictures.attach(trainer, progress, train_data)
    interruption.save_and_stop_on_request(trainer, checkpoints, signals)

    _resume(trainer, checkpoints, cfg, len(train_data.loader))
    folder.resume_from(trainer.state.iteration, progress.last["iteration"] if progress.last else 0)
    num_steps = cfg.SOLVER.MAX_EPOCHS * len(train_data.loader)
    if trainer.state.iteration >= num_steps and not evaluations.is_missing(trainer):
        logger.info("all %d epochs are done; raise SOLVER.MAX_EPOCHS to train further", cfg.SOLVER.MAX_EPOCHS)
        return _result(progress)
    _announce(cfg, accelerator, model, train_data, folder)
    with tracker.training(progress), tensorboard.running(trainer), watchdog.watching(), signals.deferred():
        _run(trainer, train_data, num_steps, evaluations, checkpoints, folder)
    report_queries(folder, evaluator.data, evaluations.scores)
    _report_best(progress, folder)
    return _result(progress)


def _build(cfg: CfgNode, accelerator: Accelerator, folder: RunDirectory, data: DataSets) -> tuple[Training, TrainData]:
    is_resumed = collectives.from_rank_zero(lambda: bool(checkpoints_in(folder.checkpoints, "last")))
    # Before the images are decoded, as weights may be missing.
    model = build_initial_model(cfg, accelerator, data.num_train_pids, load_weights=not is_resumed)
    build_stores(cfg, data)
    train_data = build_train_data(cfg, data.train, accelerator.device)
    preprocessor = BatchPreprocessor(cfg, accelerator.device, train_data.on_device)
    return build_training(cfg, accelerator, model, preprocessor), train_data


def _resume(trainer: Engine, checkpoints: Checkpoints, cfg: CfgNode, epoch_length: int) -> None:
    """Resume from the newest checkpoint, or after the epoch of one of reid-strong-baseline's."""
    if checkpoints.resume(trainer) or cfg.MODEL.PRETRAIN_CHOICE != "self":
        return
    name = Path(cfg.MODEL.PRETRAIN_PATH).name
    epoch = epoch_in_name(name)
    if epoch:
        logger.info("MODEL.PRETRAIN_CHOICE self: resumes after epoch %d of %s, with a new optimizer", epoch, name)
        max_epochs = max(cfg.SOLVER.MAX_EPOCHS, epoch)  # Ignite requires at least this
        trainer.load_state_dict({"epoch": epoch, "epoch_length": epoch_length, "max_epochs": max_epochs})


def build_tracker(cfg: CfgNode, folder: RunDirectory, data_sets: Sequence[str], fingerprint: str) -> Tracker:
    """Return the tracker of a run whose W&B configuration also records the environment and the data set."""
    facts = environment_facts() | {"slurm": slurm_job(os.environ), "dataset": fingerprint}
    return Tracker(cfg, folder.path, facts, data_sets)


def _run(
    trainer: Engine,
    train_data: TrainData,
    num_steps: int,
    evaluations: schedule.EvaluationSchedule,
    checkpoints: Checkpoints,
    folder: RunDirectory,
) -> None:
    """Train to the last step or to a signal, and wait until every file is on the disk."""
    try:
        if evaluations.is_missing(trainer):
            evaluations.run(trainer)
            checkpoints.save(trainer)
        if trainer.state.iteration < num_steps:  # Ignite would start a finished run from the beginning
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


def _result(progress: Progress) -> dict[str, Any]:
    return {**(progress.last or {}), "best": progress.best}


def _report_best(progress: Progress, folder: RunDirectory) -> None:
    best = progress.best
    assert best is not None  # the last epoch is evaluated
    console.report_test_sets(best)
    logger.info("best mAP %.1f %% after epoch %d; all files are in %s", 100 * best["mAP"], best["epoch"], folder.path)


def _announce(
    cfg: CfgNode, accelerator: Accelerator, model: ReIDModel, train_data: TrainData, folder: RunDirectory
) -> None:
    folder.describe(cfg, accelerator.device)
    logger.info(
        "training %s (%.1f million parameters) on %d x %s: %d identities, %d steps of %d images an epoch, %d epochs",
        cfg.MODEL.NAME,
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        collectives.num_ranks(),
        accelerator.device.type,
        train_data.num_pids,
        len(train_data.loader),
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.MAX_EPOCHS,
    )
