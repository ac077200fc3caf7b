"""What there is to write down while training, and the events that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ignite.engine import EventEnum

from reid.metrics import RetrievalScores

_NO_NUMBERS = ("epoch", "iteration", "datasets")  # what else there is in a validation


class Records(EventEnum):
    """Fired on all ranks when there is something new to write down."""

    TRAIN = "train_record"  # in trainer.state.metrics
    VALIDATION = "validation_record"  # in Progress.last


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is whole on the disk.

    Attributes:
        kind: last or best.
        file: which holds it, until newer ones take its place.
        facts: epoch, iteration, and the scores of the latest validation.
    """

    kind: str
    file: Path
    facts: dict[str, Any]


@dataclass
class Progress:
    """What is known of the run besides the weights; saved with them."""

    last: dict[str, Any] | None = None  # the latest validation, with its epoch and iteration
    best: dict[str, Any] | None = None  # the one with the highest mAP, the earliest of equals
    wandb_run_id: str = ""

    def add_validation(self, epoch: int, iteration: int, scores: dict[str, Any]) -> None:
        self.last = {"epoch": epoch, "iteration": iteration, **scores}
        if self.best is None or scores["mAP"] > self.best["mAP"]:
            self.best = self.last

    @property
    def last_is_best(self) -> bool:
        return self.last is self.best


def summary_of_all(scores: Mapping[str, RetrievalScores]) -> dict[str, Any]:
    """What is written down of one evaluation: the first test set's numbers, and all sets' by name if there are more.

    Args:
        scores: test set -> its scores.
    """
    summaries = {name: of_one.summary() for name, of_one in scores.items()}
    first = next(iter(summaries.values()))
    return {**first, "datasets": summaries} if len(summaries) > 1 else dict(first)


def validation_numbers(progress: Progress) -> dict[str, Any]:
    """The last validation and the best, by the names under `val/` in W&B and TensorBoard."""
    assert progress.last is not None
    assert progress.best is not None
    numbers = score_numbers(progress.last)
    return numbers | {"mAP_best": progress.best["mAP"], "best_epoch": progress.best["epoch"]}


def score_numbers(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one evaluation: the first test set's by name, all sets' by NAME/name if there are more."""
    numbers = _renamed("", {key: value for key, value in scores.items() if key not in _NO_NUMBERS})
    for name, of_one in scores.get("datasets", {}).items():
        numbers |= _renamed(f"{name}/", of_one)
    return numbers


def _renamed(prefix: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name.replace('rank-', 'cmc_rank_')}": value for name, value in scores.items()}
