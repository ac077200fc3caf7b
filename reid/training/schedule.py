"""Handlers at the start of an epoch, the check of the first batch, and the schedule of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from ignite.engine import Engine, Events

from reid.data.samplers import TrainBatches
from reid.distributed import collectives
from reid.errors import WorldError
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
    """Move the sampler to the next step; Ignite asks the loader for an iterator only after EPOCH_STARTED."""

    @trainer.on(Events.EPOCH_STARTED)
    def set_position(engine: Engine) -> None:
        num_done = engine.state.iteration - (engine.state.epoch - 1) * len(batches)
        batches.set_position(engine.state.epoch, num_done)


def train_mode_by_epoch(trainer: Engine, model: torch.nn.Module) -> None:
    @trainer.on(Events.EPOCH_STARTED)
    def set_mode() -> None:
        model.train()


def check_first_batch(trainer: Engine, cfg: CfgNode) -> None:
    """Stop before the first step if this rank's batch is not its share of the P identities with K images each."""
    if cfg.DATALOADER.SAMPLER == "softmax":
        return
    num_instances = cfg.DATALOADER.NUM_INSTANCE
    num_pids = cfg.SOLVER.IMS_PER_BATCH // num_instances // collectives.num_ranks()

    @trainer.on(Events.GET_BATCH_COMPLETED(once=1))
    def check(engine: Engine) -> None:
        _, counts = engine.state.batch.pids.unique(return_counts=True)  # type: ignore[union-attr]
        if len(counts) != num_pids or not (counts == num_instances).all():
            raise WorldError(
                f"the first batch of a rank must hold {num_pids} identities with {num_instances} images each, got "
                f"{len(counts)} with {counts.tolist()}: the sampler was replaced or sharded twice. Fix: report it."
            )


class EvaluationSchedule:
    """Evaluation after every SOLVER.EVAL_PERIOD epochs and after the last.

    Args:
        evaluate: Function that returns the scores of every test set by name; called by all ranks.
        progress: Progress, which receives the scores.
        solver: Section SOLVER.
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
        """Return whether the run was stopped between the last step of an epoch and the evaluation due after it."""
        state, last = trainer.state, self._progress.last
        if not state.iteration or not state.epoch_length or state.iteration % state.epoch_length:
            return False
        return self._is_due(trainer) and (last is None or last["iteration"] != state.iteration)

    def _is_due(self, trainer: Engine) -> bool:
        epoch = trainer.state.epoch
        return bool(epoch % self._solver.EVAL_PERIOD == 0 or epoch == self._solver.MAX_EPOCHS)
