"""The first steps of a training, timed."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Engine, Events

from reid.data.datasets import DataSets
from reid.data.loaders import TrainData, build_train_data
from reid.data.preprocessing import BatchPreprocessor
from reid.distributed import collectives
from reid.training.build import build_initial_model, build_training

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

_NUM_STEPS = 3  # that count, behind a first one that does not


@dataclass(frozen=True)
class Trial:
    """Of the slowest rank, or the one with the largest memory."""

    seconds: float  # of a step, the median
    waiting: float  # share of it until the next batch was there
    memory: int  # bytes at most: of GPU memory where there is a GPU, else of the process
    num_steps: int  # in an epoch
    state: int  # bytes of weights and optimiser, as a checkpoint holds them


def try_steps(cfg: CfgNode, accelerator: Accelerator, data: DataSets) -> Trial:
    """Builds all that a training builds and trains; writes nothing. Called by all ranks."""
    train_data = build_train_data(cfg, data.train, accelerator.device)
    model = build_initial_model(cfg, accelerator, train_data.num_pids)
    training = build_training(cfg, accelerator, model, BatchPreprocessor(cfg, accelerator.device, train_data.on_device))
    training.wrapped.train()
    seconds, waiting = _time_steps(training.trainer, train_data, accelerator.device)
    of_ranks = collectives.gather_objects((seconds, waiting, _memory(accelerator.device)))
    slowest, most_waiting, most_memory = (max(values) for values in zip(*of_ranks, strict=True))
    state = _num_bytes(model.state_dict()) + _num_bytes(training.optimizer.state_dict())
    return Trial(slowest, most_waiting / slowest, int(most_memory), len(train_data.loader), state)


def _time_steps(trainer: Engine, train_data: TrainData, device: torch.device) -> tuple[float, float]:
    """Median seconds of a step, and of waiting for its batch."""
    began: list[float] = []
    loaded: list[float] = []
    ended: list[float] = []

    def note(times: list[float]) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())

    trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: note(began))
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: note(loaded))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: note(ended))
    train_data.batches.set_position(1, 0)
    trainer.run(train_data.loader, max_epochs=1, epoch_length=min(_NUM_STEPS + 1, len(train_data.loader)))
    steps = list(zip(began, loaded, ended, strict=False))
    counted = steps[1:] or steps  # an epoch may have one step only
    return (
        statistics.median(end - start for start, _, end in counted),
        statistics.median(batch - start for start, batch, _ in counted),
    )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _num_bytes(state: Any) -> int:
    """Of all tensors in it."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_num_bytes, state.values()))
    return sum(map(_num_bytes, state)) if isinstance(state, list | tuple) else 0
