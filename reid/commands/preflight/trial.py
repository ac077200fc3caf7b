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

_NUM_STEPS = 3  # timed steps, after a first one that is not timed


@dataclass(frozen=True)
class Trial:
    """Time and memory of a few trial steps: the worst value over all ranks."""

    seconds: float  # median duration of a step
    waiting: float  # share of a step spent waiting for its batch
    memory: int  # largest number of bytes: of the GPU if there is one, else of the process
    num_steps: int  # steps of an epoch
    state: int  # bytes of a checkpoint: weights and optimizer


def try_steps(cfg: CfgNode, accelerator: Accelerator, data: DataSets) -> Trial:
    """Build a training and time its first steps; nothing is written. Called by all ranks."""
    train_data = build_train_data(cfg, data.train, accelerator.device)
    model = build_initial_model(cfg, accelerator, train_data.num_pids)
    training = build_training(cfg, accelerator, model, BatchPreprocessor(cfg, accelerator.device, train_data.on_device))
    training.wrapped.train()
    seconds, waiting = _time_steps(training.trainer, train_data, accelerator.device)
    by_rank = collectives.gather_objects((seconds, waiting, _memory(accelerator.device)))
    slowest, most_waiting, most_memory = map(max, zip(*by_rank, strict=True))
    state = _num_bytes(model.state_dict()) + _num_bytes(training.optimizer.state_dict())
    return Trial(slowest, most_waiting / slowest, int(most_memory), len(train_data.loader), state)


def _time_steps(trainer: Engine, train_data: TrainData, device: torch.device) -> tuple[float, float]:
    """Return the median seconds of a step, and of waiting for its batch."""
    events = (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED)
    recorded: list[list[float]] = [[], [], []]

    def record(times: list[float]) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())

    for event, times in zip(events, recorded, strict=True):
        trainer.add_event_handler(event, record, times)
    train_data.batches.set_position(1, 0)
    trainer.run(train_data.loader, max_epochs=1, epoch_length=min(_NUM_STEPS + 1, len(train_data.loader)))
    steps = list(zip(*recorded, strict=False))
    timed = steps[1:] or steps  # an epoch may have a single step
    return (
        statistics.median(end - start for start, _, end in timed),
        statistics.median(batch - start for start, batch, _ in timed),
    )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _num_bytes(state: Any) -> int:
    """Return the number of bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_num_bytes, state.values()))
    return sum(map(_num_bytes, state)) if isinstance(state, list | tuple) else 0
