"""Checks while training runs: the first batch is what was planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ignite.engine import Engine, Events

from reid.distributed import collectives
from reid.errors import WorldError

if TYPE_CHECKING:
    from yacs.config import CfgNode


def check_first_batch(trainer: Engine, cfg: CfgNode) -> None:
    """Stops before the first step if this rank's batch is not its share of the P identities with K images each."""
    if cfg.DATALOADER.SAMPLER == "softmax":
        return
    num_instances = cfg.DATALOADER.NUM_INSTANCE
    num_pids = cfg.SOLVER.IMS_PER_BATCH // num_instances // collectives.num_ranks()

    @trainer.on(Events.GET_BATCH_COMPLETED(once=1))
    def check(engine: Engine) -> None:
        pids = engine.state.batch.pids  # type: ignore[union-attr]
        _, counts = pids.unique(return_counts=True)
        if len(counts) != num_pids or not (counts == num_instances).all():
            raise WorldError(
                f"this rank's first batch must hold {num_pids} identities with {num_instances} images each, but it "
                f"holds {len(counts)} with {counts.tolist()}; the sampler was replaced or sharded a second time"
            )
