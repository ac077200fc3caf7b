"""What there is to write down while training, and the events that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ignite.engine import EventEnum

from reid.metrics import RetrievalScores


class Records(EventEnum):
    """Fired on all ranks when there is something new to write down."""

    TRAIN = "train_record"  # in trainer.state.metrics
    VALIDATION = "validation_record"  # in Progress.last


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
