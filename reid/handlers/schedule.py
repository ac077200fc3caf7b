"""When things happen: the learning rate and the sampler's place at every epoch's start, and when to evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from ignite.engine import Engine, Events

from reid.data.samplers import TrainBatches
from reid.handlers.records import Progress, Records
from reid.metrics import RetrievalScores
from reid.optim import learning_rate, set_learning_rate

if TYPE_CHECKING:
    from yacs.config import CfgNode


def set_learning_rate_by_epoch(trainer: Engine, optimizer: torch.optim.Optimizer, solver: CfgNode) -> None:
    @trainer.on(Events.EPOCH_STARTED)
    def set_rate(engine: Engine) -> None:
        set_learning_rate(optimizer, learning_rate(solver, engine.state.epoch))


def place_sampler(trainer: Engine, batches: TrainBatches) -> None:
    """Ignite fires EPOCH_STARTED before it asks the loader for an iterator, in a resumed epoch too."""

    @trainer.on(Events.EPOCH_STARTED)
    def place(engine: Engine) -> None:
        done = engine.state.iteration - (engine.state.epoch - 1) * len(batches)
        batches.set_position(engine.state.epoch, done)


def train_mode_by_epoch(trainer: Engine, model: torch.nn.Module) -> None:
    @trainer.on(Events.EPOCH_STARTED)
    def set_mode() -> None:
        model.train()


def evaluate_every(
    trainer: Engine, evaluate: Callable[[], RetrievalScores], progress: Progress, num_epochs: int
) -> None:
    """Evaluates after every `num_epochs` epochs and after the last."""

    @trainer.on(Events.EPOCH_COMPLETED)
    def run(engine: Engine) -> None:
        if engine.state.epoch % num_epochs == 0 or engine.state.epoch == engine.state.max_epochs:
            progress.add_validation(engine.state.epoch, engine.state.iteration, evaluate().summary())
            engine.fire_event(Records.VALIDATION)
