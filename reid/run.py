"""The stories: train and evaluate; each builds, wires and runs, called by all ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reid import distributed, weights
from reid.config import by_full_key
from reid.criterion import Criterion
from reid.data.benchmarks import fingerprint
from reid.data.loaders import TrainData, build_test_data, build_train_data, open_benchmark
from reid.engine import Preparation, build_trainer
from reid.errors import SettingsError
from reid.evaluation import Evaluator
from reid.handlers import console, guards, schedule
from reid.handlers.checkpoint import Checkpoints, checkpoints_in
from reid.handlers.meters import TrainMeter
from reid.handlers.records import Progress
from reid.handlers.tracking import Tracker
from reid.model import ReIDModel, build_model
from reid.optim import build_optimizer
from reid.run_directory import RunDirectory, commit
from reid.sync_batchnorm import synchronise_batchnorm

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger("reid.run")


def train(cfg: CfgNode, accelerator: Accelerator) -> None:
    """Trains from the newest checkpoint in OUTPUT_DIR, or from the start, to SOLVER.MAX_EPOCHS."""
    distributed.agree(_facts(cfg))
    folder = RunDirectory(Path(cfg.OUTPUT_DIR))
    folder.claim()
    benchmark = open_benchmark(cfg)
    dataset = fingerprint(benchmark)
    distributed.agree({"the fingerprint of the images": dataset})
    train_data, test_data = build_train_data(cfg, benchmark), build_test_data(cfg, benchmark)

    model = _new_model(cfg, accelerator, train_data.num_pids, folder)
    wrapped, optimizer = distributed.wrap(accelerator, model, build_optimizer(cfg.SOLVER, model))

    trainer = build_trainer(wrapped, Criterion(cfg), optimizer, accelerator, Preparation(cfg, accelerator.device))
    evaluator = Evaluator(model, accelerator, test_data, cfg)
    progress = Progress()
    checkpoints = Checkpoints(folder.checkpoints, model, optimizer, progress, cfg, dataset, accelerator.scaler)
    tracker = Tracker(cfg, folder.path, {"world_size": distributed.num_ranks(), "dataset": dataset})
    meter = TrainMeter(log_period=cfg.SOLVER.LOG_PERIOD, batch_size=cfg.SOLVER.IMS_PER_BATCH, optimizer=optimizer)

    # Each line is one effect. Where two share an event, the upper one acts first: evaluate, keep the best, write it
    # down, save.
    schedule.set_learning_rate_by_epoch(trainer, optimizer, cfg.SOLVER)
    schedule.place_sampler(trainer, train_data.batches)
    schedule.train_mode_by_epoch(trainer, wrapped)
    guards.check_first_batch(trainer, cfg)
    meter.attach(trainer)
    schedule.evaluate_every(trainer, evaluator.run, progress, cfg.SOLVER.EVAL_PERIOD)
    checkpoints.attach(trainer)
    console.attach(trainer, folder, progress)
    tracker.attach(trainer, progress)

    checkpoints.resume(trainer)
    folder.drop_metrics_after(trainer.state.iteration)
    if trainer.state.iteration >= cfg.SOLVER.MAX_EPOCHS * len(train_data.loader):
        logger.info("all %d epochs are done; raise SOLVER.MAX_EPOCHS to go on", cfg.SOLVER.MAX_EPOCHS)
        return
    folder.describe(cfg, accelerator.device)
    _announce(cfg, accelerator, model, train_data)
    with tracker.running(progress):
        trainer.run(train_data.loader, max_epochs=cfg.SOLVER.MAX_EPOCHS, epoch_length=len(train_data.loader))
    assert progress.best is not None  # the last epoch is evaluated
    best = progress.best
    logger.info("best mAP %.1f %% after epoch %d; all is in %s", 100 * best["mAP"], best["epoch"], folder.path)


def evaluate(cfg: CfgNode, accelerator: Accelerator) -> None:
    """Evaluates the checkpoint TEST.WEIGHT and writes result.json."""
    if not cfg.TEST.WEIGHT:
        found = checkpoints_in(Path(cfg.OUTPUT_DIR) / "checkpoints", "best")
        remedy = f"the best of this run is {found[-1]}" if found else "add TEST.WEIGHT FILE to the command"
        raise distributed.shared(SettingsError(f"TEST.WEIGHT must name the checkpoint to evaluate, got ''; {remedy}"))
    content = distributed.together(lambda: weights.read_file(Path(cfg.TEST.WEIGHT), "TEST.WEIGHT"))
    folder = RunDirectory(Path(cfg.OUTPUT_DIR))
    test_data = build_test_data(cfg, open_benchmark(cfg))
    classifier = weights.state_dict_of(content).get("classifier.weight")
    model = build_model(cfg, num_pids=1 if classifier is None else len(classifier))
    weights.load_for_evaluation(model, content, f"TEST.WEIGHT={cfg.TEST.WEIGHT}")
    place(model, cfg, accelerator)
    scores = Evaluator(model, accelerator, test_data, cfg).run().summary()
    result: dict[str, Any] = {"epoch": content.get("epoch"), **scores, "weight": cfg.TEST.WEIGHT}
    if distributed.is_main():
        folder.write_result(result)
    logger.info("%s: %s", cfg.TEST.WEIGHT, console.describe_scores(scores))


def _new_model(cfg: CfgNode, accelerator: Accelerator, num_pids: int, folder: RunDirectory) -> ReIDModel:
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg, num_pids)
    if not distributed.on_main(lambda: checkpoints_in(folder.checkpoints, "last")):  # else all weights come from there
        weights.initialise(model, cfg)
    place(model, cfg, accelerator)
    if cfg.SOLVER.SYNC_BN:
        synchronise_batchnorm(model)
    return model


def place(model: ReIDModel, cfg: CfgNode, accelerator: Accelerator) -> None:
    """Moves the model to its device, in the number type and memory format that it computes in."""
    dtype = torch.float64 if cfg.SOLVER.PRECISION == "fp64" else torch.float32
    model.to(device=accelerator.device, dtype=dtype)
    if accelerator.device.type == "cuda":  # faster there; on a CPU its BatchNorm is less exact, and no faster
        model.to(memory_format=torch.channels_last)


def _facts(cfg: CfgNode) -> dict[str, object]:
    """What must be the same on all ranks; each node may have data and caches in folders of its own."""
    own_folders = ("DATASETS.ROOT_DIR", "DATASETS.CACHE_DIR")
    settings = {key: value for key, value in by_full_key(cfg).items() if key not in own_folders}
    return settings | {"torch": torch.__version__, "the commit of reid": commit()}


def _announce(cfg: CfgNode, accelerator: Accelerator, model: ReIDModel, train_data: TrainData) -> None:
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
