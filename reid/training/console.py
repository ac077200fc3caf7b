"""Log lines, progress bar, metrics.jsonl and result.json of a training, by rank 0."""

from __future__ import annotations

import logging
import sys
from typing import Any

from ignite.engine import Engine
from ignite.handlers import ProgressBar
from tqdm import tqdm

from reid.distributed import collectives
from reid.process.text_tables import format_table
from reid.runs.directory import RunDirectory
from reid.runs.progress import Progress, Records

logger = logging.getLogger(__name__)
step_logger = logging.getLogger(f"{__name__}.steps")  # replaced by the progress bar on a terminal

_TERMS = ("id", "triplet", "center")
_PERCENTAGES = ("mAP", "mINP", "rank-1", "rank-5", "rank-10")


def attach(trainer: Engine, folder: RunDirectory, progress: Progress) -> None:
    """Write each record, on rank 0."""
    if not collectives.is_main():
        return
    trainer.add_event_handler(Records.TRAIN, _write_train_record, folder)
    trainer.add_event_handler(Records.VALIDATION, _write_validation_record, folder, progress)
    if sys.stderr.isatty():
        _show_progress_bar(trainer)


def _write_train_record(trainer: Engine, folder: RunDirectory) -> None:
    state = trainer.state
    metrics = state.metrics
    folder.append_metrics({"kind": "train", "epoch": state.epoch, "iteration": state.iteration, **metrics})
    assert state.epoch_length is not None
    step = (state.iteration - 1) % state.epoch_length + 1
    terms = ", ".join(f"{name} {metrics[name]:.3f}" for name in _TERMS if name in metrics)
    (logger if step == state.epoch_length else step_logger).info(
        f"epoch {state.epoch}/{state.max_epochs} step {step}/{state.epoch_length}: loss {metrics['loss']:.3f} "
        f"({terms}), accuracy {100 * metrics['acc']:.1f} %, lr {metrics['lr']:.2e}, "
        f"{metrics['images_per_second']:.0f} images/s, {100 * metrics['data_wait']:.0f} % waiting for data"
    )


def _write_validation_record(trainer: Engine, folder: RunDirectory, progress: Progress) -> None:
    assert progress.last is not None
    folder.append_metrics({"kind": "val", **progress.last})
    folder.write_result(progress.last)
    for line in describe_scores(progress.last):
        logger.info("epoch %d: %s", trainer.state.epoch, line)


def describe_scores(scores: dict[str, Any]) -> list[str]:
    """Return a line for each test set of `progress.summary_of_all`: percentages, and the number of valid queries."""
    if "datasets" in scores:
        return [f"{name}: {_describe(summary)}" for name, summary in scores["datasets"].items()]
    return [_describe(scores)]


def report_test_sets(scores: dict[str, Any]) -> None:
    """Log a table of all test sets if there are several."""
    if "datasets" in scores:
        logger.info("%s", score_table(scores))


def score_table(scores: dict[str, Any]) -> str:
    """Return the scores of all test sets as a table, in percent."""
    rows = [["test set", *_PERCENTAGES, "queries"]]
    for name, summary in scores["datasets"].items():
        percentages = (f"{100 * summary[key]:.1f}" if key in summary else "" for key in _PERCENTAGES)
        rows.append([name, *percentages, str(summary["num_valid_queries"])])
    return format_table(rows, "<" + ">" * (len(_PERCENTAGES) + 1))


def _describe(scores: dict[str, Any]) -> str:
    names = [*(name for name in _PERCENTAGES if name in scores), *(name for name in scores if name.startswith("TPR@"))]
    percentages = [f"{name} {100 * scores[name]:.1f} %" for name in names]
    left_out = scores["num_queries"] - scores["num_valid_queries"]
    note = f" ({left_out} without a match left out)" if left_out else ""
    return f"{', '.join(percentages)}, {scores['num_valid_queries']} queries{note}"


def _show_progress_bar(trainer: Engine) -> None:
    """Show a bar instead of the lines within an epoch; other lines are written above it."""
    ProgressBar(persist=False, desc="epoch").attach(trainer)
    for handler in logging.getLogger("reid").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.addFilter(lambda record: record.name != step_logger.name)
            handler.setStream(_AboveTheBar())


class _AboveTheBar:
    """A stream that writes lines above the progress bar."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout, end="")

    def flush(self) -> None:
        sys.stdout.flush()
