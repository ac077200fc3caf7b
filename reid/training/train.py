"""The run of a training: build, attach the handlers, resume, train, report.

To follow one batch, one signal or one W&B row, read `attach_handlers`: it lists everything that acts on an event.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from reid.process.signals import Preempted, Signals
from reid.runs.directory import RunDirectory, environment_facts
from reid.runs.ownership import Ownership
from reid.runs.progress import Progress, attach_rows
from reid.runs.start_checks import check_start
from reid.tracking.tensorboard import TensorBoard
from reid.tracking.tracker import Tracker
from reid.training import console, schedule
from reid.training.build import Training, build_initial_model, build_training
from reid.training.checkpointing import Checkpoints

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)


class Run:
    """Everything that acts on a training, assembled from the settings; called by all ranks."""

    def __init__(self, cfg: CfgNode, accelerator: Accelerator, signals: Signals) -> None:
        self.cfg, self.accelerator, self.signals = cfg, accelerator, signals
        self.folder = RunDirectory(Path(cfg.OUTPUT_DIR))
        self.ownership = Ownership(self.folder, read_start(os.environ))
        data = open_data_sets(cfg, train=True)
        self.training, self.train_data = _build_training(cfg, accelerator, self.folder, data)
        self.num_steps = int(cfg.SOLVER.MAX_EPOCHS) * len(self.train_data.loader)
        self.progress, self.watchdog = Progress(), Watchdog(cfg.SOLVER.TIMEOUT_MINUTES)
        fingerprint = data.fingerprint_of_training()
        self.tracker = build_tracker(cfg, self.folder, [benchmark.name for benchmark in data.train], fingerprint)
        self.tensorboard = TensorBoard(cfg, self.folder.path)
        self.pictures = Pictures(cfg, self.folder.pictures, data, self.tracker.show)
        self.evaluator = EvaluatorGroup(
            data,
            self.training.model,
            accelerator,
            cfg,
            on_scored=self.pictures.compare,
            beat=self.watchdog.beat,
            is_stopped=signals.were_received,
        )
        self.evaluations = schedule.EvaluationSchedule(self.evaluator.run, self.progress, cfg.SOLVER)
        self.checkpoints = Checkpoints(
            cfg,
            self.folder.checkpoints,
            fingerprint,
            self.training,
            self.progress,
            on_saved=self.tracker.keep_checkpoint,
            verify=self.ownership.check,
        )


def train(cfg: CfgNode, accelerator: Accelerator, signals: Signals) -> dict[str, Any]:
    """Train from the newest checkpoint in OUTPUT_DIR, or from the start, to SOLVER.MAX_EPOCHS; called by all ranks.

    Returns:
        Scores of the last evaluation, as in result.json, and under "best" those of the best one.

    Raises:
        Preempted: A signal came; raised on all ranks when everything is saved.
    """
    check_start(cfg)
    run = Run(cfg, accelerator, signals)
    attach_handlers(run)
    _resume(run)
    trainer, progress = run.training.trainer, run.progress
    if trainer.state.iteration >= run.num_steps and not run.evaluations.is_missing(trainer):
        logger.info("all %d epochs are done; raise SOLVER.MAX_EPOCHS to train further", cfg.SOLVER.MAX_EPOCHS)
        return _result(progress)
    _describe(run)
    with run.tracker.training(progress), run.tensorboard.running(trainer), run.watchdog.watching(), signals.deferred():
        _run_and_save(run)
    report_queries(run.folder, run.evaluator.data, run.evaluations.scores)
    _report_best(progress, run.folder)
    return _result(progress)


def attach_handlers(run: Run) -> None:
    """Attach everything that acts on an event. Handlers of the same event run in the order of this list.

    | event                | handlers, in order                                                                    |
    |----------------------|---------------------------------------------------------------------------------------|
    | EPOCH_STARTED        | set learning rate, sampler position and train mode; start the meter's clock           |
    | GET_BATCH_COMPLETED  | check the first batch; measure the wait for data                                      |
    | ITERATION_COMPLETED  | watchdog beat; meter (fires Records.TRAIN); agree on saving and stopping              |
    | EPOCH_COMPLETED      | evaluation (fires Records.VALIDATION); checkpoint                                     |
    | Records.TRAIN        | ownership check; console and metrics.jsonl; W&B; TensorBoard                          |
    | Records.VALIDATION   | ownership check; best checkpoint; console and files; W&B; TensorBoard; pictures       |
    """
    trainer, cfg, progress = run.training.trainer, run.cfg, run.progress
    run.watchdog.attach(trainer)
    schedule.set_learning_rate_by_epoch(trainer, run.training.optimizer, cfg.SOLVER)
    schedule.set_sampler_position(trainer, run.train_data.batches)
    schedule.train_mode_by_epoch(trainer, run.training.wrapped)
    schedule.check_first_batch(trainer, cfg)
    run.training.meter.attach(trainer)
    run.evaluations.attach(trainer)
    run.ownership.attach(trainer)
    run.checkpoints.attach(trainer)
    console.attach(trainer, run.folder, progress)
    attach_rows(trainer, progress, run.tracker.log_row)
    attach_rows(trainer, progress, run.tensorboard.log_row)
    run.pictures.attach(trainer, progress, run.train_data)
    run.checkpoints.save_and_stop_on_request(trainer, run.signals)


def _build_training(
    cfg: CfgNode, accelerator: Accelerator, folder: RunDirectory, data: DataSets
) -> tuple[Training, TrainData]:
    is_resumed = collectives.from_rank_zero(lambda: bool(checkpoints_in(folder.checkpoints, "last")))
    # Before the images are decoded, as weights may be missing.
    model = build_initial_model(cfg, accelerator, data.num_train_pids, load_weights=not is_resumed)
    build_stores(cfg, data)
    train_data = build_train_data(cfg, data.train, accelerator.device)
    preprocessor = BatchPreprocessor(cfg, accelerator.device, train_data.on_device)
    return build_training(cfg, accelerator, model, preprocessor), train_data


def build_tracker(cfg: CfgNode, folder: RunDirectory, data_sets: Sequence[str], fingerprint: str) -> Tracker:
    """Return the tracker of a run whose W&B configuration also records the environment and the data set."""
    facts = environment_facts() | {"slurm": slurm_job(os.environ), "dataset": fingerprint}
    return Tracker(cfg, folder.path, facts, data_sets)


def _resume(run: Run) -> None:
    """Resume from the newest checkpoint, or after the epoch of one of reid-strong-baseline's."""
    cfg, trainer, progress = run.cfg, run.training.trainer, run.progress
    if not run.checkpoints.resume(trainer) and cfg.MODEL.PRETRAIN_CHOICE == "self":
        name = Path(cfg.MODEL.PRETRAIN_PATH).name
        epoch = epoch_in_name(name)
        if epoch:
            logger.info("MODEL.PRETRAIN_CHOICE self: resumes after epoch %d of %s, with a new optimizer", epoch, name)
            max_epochs = max(cfg.SOLVER.MAX_EPOCHS, epoch)  # Ignite requires at least this
            position = {"epoch": epoch, "epoch_length": len(run.train_data.loader), "max_epochs": max_epochs}
            trainer.load_state_dict(position)
    run.folder.resume_from(trainer.state.iteration, progress.last["iteration"] if progress.last else 0)


def _run_and_save(run: Run) -> None:
    """Train to the last step or to a signal, and wait until every file is on the disk."""
    trainer, checkpoints, loader = run.training.trainer, run.checkpoints, run.train_data.loader
    try:
        if run.evaluations.is_missing(trainer):
            run.evaluations.run(trainer)
            checkpoints.save(trainer)
        if trainer.state.iteration < run.num_steps:  # Ignite would start a finished run from the beginning
            trainer.run(loader, max_epochs=run.cfg.SOLVER.MAX_EPOCHS, epoch_length=len(loader))
    except Preempted:
        checkpoints.save(trainer)
        checkpoints.finish()
        run.folder.finish()
        run.folder.leave_marker(f"saved after iteration {trainer.state.iteration}")
        raise
    checkpoints.finish()
    run.folder.finish()


def _describe(run: Run) -> None:
    """Write config.yaml and environment.json, and log what is trained."""
    device, train_data, num_epochs = run.accelerator.device, run.train_data, run.cfg.SOLVER.MAX_EPOCHS
    run.folder.describe(run.cfg, device)
    num_parameters = sum(parameter.numel() for parameter in run.training.model.parameters())
    logger.info(
        f"training {run.cfg.MODEL.NAME} ({num_parameters / 1e6:.1f} million parameters) on {collectives.num_ranks()} x "
        f"{device.type}: {train_data.num_pids} identities, {len(train_data.loader)} steps of "
        f"{run.cfg.SOLVER.IMS_PER_BATCH} images an epoch, {num_epochs} epochs"
    )


def _report_best(progress: Progress, folder: RunDirectory) -> None:
    best = progress.best
    assert best is not None  # the last epoch is evaluated
    console.report_test_sets(best)
    logger.info("best mAP %.1f %% after epoch %d; all files are in %s", 100 * best["mAP"], best["epoch"], folder.path)


def _result(progress: Progress) -> dict[str, Any]:
    return {**(progress.last or {}), "best": progress.best}
