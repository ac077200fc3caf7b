"""When things happen: the learning rate and the sampler's place at every epoch's start, and when to evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from ignite.engine import Engine, Events

from reid.data.samplers import TrainBatches
from reid.evaluation.evaluator import Scores
from reid.runs.progress import Progress, Records, summary_of_all
from reid.training.optim import learning_rate, set_learning_rate

if TYPE_CHECKING:
    from yacs.config import CfgNode


def set_learning_rate_by_epoch(trainer: Engine, optimizer: torch.optim.Optimizer, solver: CfgNode) -> None:
    @trainer.on(Events.EPOCH_STARTED)
    def set_rate(engine: Engine) -> None:
        set_learning_rate(optimizer, learning_rate(solver, engine.state.epoch))


def set_sampler_position(trainer: Engine, batches: TrainBatches) -> None:
    """Ignite fires EPOCH_STARTED before it asks the loader for an iterator, in a resumed epoch too."""

    @trainer.on(Events.EPOCH_STARTED)
    def place(engine: Engine) -> None:
        done = engine.state.iteration - (engine.state.epoch - 1) * len(batches)
        batches.set_position(engine.state.epoch, done)


def train_mode_by_epoch(trainer: Engine, model: torch.nn.Module) -> None:
    @trainer.on(Events.EPOCH_STARTED)
    def set_mode() -> None:
        model.train()


class EvaluationSchedule:
    """Evaluates after every SOLVER.EVAL_PERIOD epochs and after the last.

    Args:
        evaluate: gives the scores of every test set by name; called by all ranks.
        progress: told of every outcome.
        solver: the SOLVER section.
    """

    def __init__(self, evaluate: Callable[[], Scores], progress: Progress, solver: CfgNode) -> None:
        self._evaluate, self._progress, self._solver = evaluate, progress, solver
        self.scores: Scores = {}  # of the latest evaluation of this process

    def attach(self, trainer: Engine) -> None:
        @trainer.on(Events.EPOCH_COMPLETED)
        def run_if_due(engine: Engine) -> None:
            if self._is_due(engine):
                self.run(engine)

    def run(self, trainer: Engine) -> None:
        self.scores = self._evaluate()
        self._progress.add_validation(trainer.state.epoch, trainer.state.iteration, summary_of_all(self.scores))
        trainer.fire_event(Records.VALIDATION)

    def is_missing(self, trainer: Engine) -> bool:
        """Whether the run was stopped behind the last step of an epoch, before the evaluation that is due there."""
        state, last = trainer.state, self._progress.last
        if not state.iteration or not state.epoch_length or state.iteration % state.epoch_length:
            return False
        return self._is_due(trainer) and (last is None or last["iteration"] != state.iteration)

    def _is_due(self, trainer: Engine) -> bool:
        epoch = trainer.state.epoch
        return bool(epoch % self._solver.EVAL_PERIOD == 0 or epoch == self._solver.MAX_EPOCHS)
