"""Records of a training (steps, validations, checkpoints) and the events that announce them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import Engine, EventEnum

from reid.retrieval.metrics import RetrievalScores

_NO_SCORES = ("epoch", "iteration", "datasets")  # other entries of a validation


class Records(EventEnum):
    """Events that the trainer fires on all ranks for each new record."""

    TRAIN = "train_record"  # in trainer.state.metrics
    VALIDATION = "validation_record"  # in Progress.last


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is completely on disk.

    Attributes:
        kind: "last" or "best".
        file: Path of the checkpoint, until newer ones replace it.
        facts: Epoch, iteration, and the scores of the latest validation.
    """

    kind: str
    file: Path
    facts: dict[str, Any]


@dataclass
class Progress:
    """Scores and W&B id of a run, saved with its weights."""

    last: dict[str, Any] | None = None  # the latest validation, with its epoch and iteration
    best: dict[str, Any] | None = None  # the one with the highest mAP, the earliest of equals
    wandb_run_id: str = ""

    def add_validation(self, epoch: int, iteration: int, scores: dict[str, Any]) -> None:
        self.last = {"epoch": epoch, "iteration": iteration, **scores}
        if self.best is None or scores["mAP"] > self.best["mAP"]:
            self.best = self.last

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def last_is_best(self) -> bool:
        return self.last is self.best


def attach_rows(
    trainer: Engine, progress: Progress, log_row: Callable[[str, Mapping[str, Any], int, int], None]
) -> None:
    """Call `log_row(section, numbers, iteration, epoch)` for each record."""

    @trainer.on(Records.TRAIN)
    def log_train(engine: Engine) -> None:
        log_row("train", engine.state.metrics, engine.state.iteration, engine.state.epoch)

    @trainer.on(Records.VALIDATION)
    def log_validation(engine: Engine) -> None:
        log_row("val", validation_numbers(progress), engine.state.iteration, engine.state.epoch)


def summary_of_all(scores: Mapping[str, RetrievalScores]) -> dict[str, Any]:
    """Return the record of an evaluation: the scores of the first test set, and those of several sets by name."""
    summaries = {name: of_one_set.summary() for name, of_one_set in scores.items()}
    first = next(iter(summaries.values()))
    return {**first, "datasets": summaries} if len(summaries) > 1 else dict(first)


def validation_numbers(progress: Progress) -> dict[str, Any]:
    """Return the last validation and the best, by their names under `val/` in W&B and TensorBoard."""
    assert progress.last is not None
    assert progress.best is not None
    numbers = score_numbers(progress.last)
    return numbers | {"mAP_best": progress.best["mAP"], "best_epoch": progress.best["epoch"]}


def score_numbers(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a record: the first test set's by name, those of several sets by SET/name."""
    numbers = _renamed("", {key: value for key, value in scores.items() if key not in _NO_SCORES})
    for name, summary in scores.get("datasets", {}).items():
        numbers |= _renamed(f"{name}/", summary)
    return numbers


def _renamed(prefix: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name.replace('rank-', 'cmc_rank_')}": value for name, value in scores.items()}
