"""All ranks agree on the step at which to save by the clock, or to save and stop because of a signal."""

from __future__ import annotations

from ignite.engine import Engine, Events

from reid.distributed import collectives
from reid.errors import shared
from reid.process.signals import Preempted, Signals
from reid.training.checkpointing import Checkpoints

_SAVE, _STOP = 1, 2


def save_and_stop_on_request(trainer: Engine, checkpoints: Checkpoints, signals: Signals) -> None:
    """Attach it behind all that acts on a step; what a rank wants, all do one step later.

    Raises:
        Preempted: out of the engine, on all ranks at the same step, which the caller must save.
    """
    consensus = collectives.Consensus()

    @trainer.on(Events.ITERATION_COMPLETED)
    def exchange(engine: Engine) -> None:
        wanted = _STOP if signals.were_received() else _SAVE if checkpoints.is_due() else 0
        agreed = consensus.exchange(wanted)
        if agreed == _STOP:
            raise shared(Preempted())
        if agreed == _SAVE:
            checkpoints.save(engine)
