"""The command `evaluate`: scores of the checkpoint TEST.WEIGHT."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reid.checkpoints.save import checkpoints_in
from reid.checkpoints.trained import read_trained
from reid.checkpoints.weight_file import is_at_wandb
from reid.data.datasets import open_data_sets
from reid.data.loaders import build_stores
from reid.distributed import collectives
from reid.distributed.watchdog import Watchdog
from reid.errors import SettingsError, shared
from reid.evaluation.evaluator import EvaluatorGroup, report_queries
from reid.evaluation.ranked_galleries import Pictures
from reid.process.signals import Signals
from reid.runs.directory import RunDirectory
from reid.runs.progress import score_numbers, summary_of_all
from reid.runs.start_checks import check_start
from reid.tracking import artifacts
from reid.training import console
from reid.training.train import build_tracker

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, accelerator: Accelerator, signals: Signals) -> dict[str, Any]:
    """Evaluate the checkpoint TEST.WEIGHT and write result.json and per_query.csv; called by all ranks.

    Returns:
        The content of result.json.

    Raises:
        SettingsError: TEST.WEIGHT is empty.
        WorldError: The checkpoint cannot be read or does not fit.
        DataError: A benchmark is missing or has no query with a match.
    """
    del signals  # nothing has to be saved, so the first signal ends the process
    check_start(cfg)
    if not cfg.TEST.WEIGHT:
        existing = checkpoints_in(Path(cfg.OUTPUT_DIR) / "checkpoints", "best")
        remedy = f"the best of this run is {existing[-1]}" if existing else "add TEST.WEIGHT FILE to the command"
        raise shared(
            SettingsError(f"TEST.WEIGHT must name the checkpoint to evaluate, got ''; {remedy}", key="TEST.WEIGHT")
        )
    trained = read_trained(cfg, accelerator)
    folder = RunDirectory(Path(cfg.OUTPUT_DIR))
    data = open_data_sets(cfg, train=False)
    build_stores(cfg, data)
    watchdog = Watchdog(cfg.SOLVER.TIMEOUT_MINUTES)
    tracker = build_tracker(cfg, folder, [benchmark.name for benchmark in data.test], data.fingerprint_of_tests())
    pictures = Pictures(cfg, folder.pictures, data, tracker.show)
    evaluator = EvaluatorGroup(data, trained.model, accelerator, cfg, on_scored=pictures.compare, beat=watchdog.beat)
    epoch = trained.content.get("epoch")
    epoch = epoch if isinstance(epoch, int) else None  # other programs' files may hold anything there
    with tracker.evaluation(), watchdog.watching():
        reference = cfg.TEST.WEIGHT.removeprefix("wandb:") if is_at_wandb(cfg) else ""
        tracker.use_checkpoint(trained.file, reference or artifacts.reference_of(trained.content))
        scores = evaluator.run()
        summary = summary_of_all(scores)
        pictures.draw(Path(cfg.TEST.WEIGHT).name, None, epoch)
        tracker.log_row("test", score_numbers(summary), None, epoch)
    result: dict[str, Any] = {"epoch": epoch, **summary, "weight": cfg.TEST.WEIGHT}
    if collectives.is_main():
        folder.write_result(result)
    for line in console.describe_scores(summary):
        logger.info("%s: %s", cfg.TEST.WEIGHT, line)
    report_queries(folder, evaluator.data, scores)
    console.report_test_sets(summary)
    return result
