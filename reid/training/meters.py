"""Means over the steps since the last record, equal on all ranks; only here does training wait for the device."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from reid.distributed import collectives
from reid.errors import NonFiniteError, shared
from reid.runs.progress import Records


class TrainMeter:
    """Accumulates the step's shares on the device, and sums them over the ranks every log period and epoch end.

    A record is a mean over the steps since the last one. It also has images per second (waiting for data included), the
    fraction of time spent on waiting for data (of the rank that waited longest), and the GPU memory in MiB (of the rank
    that needed most so far).

    Args:
        log_period: Number of steps between records, counted within an epoch.
        batch_size: Number of images of the global batch.
        optimizer: Optimizer whose learning rate is recorded.
    """

    def __init__(self, *, log_period: int, batch_size: int, optimizer: torch.optim.Optimizer) -> None:
        self._log_period, self._batch_size, self._optimizer = log_period, batch_size, optimizer
        self._names: list[str] = []
        self._num_steps = self._num_timed = 0
        self._sums = self._first_bad = torch.zeros(0)
        self._window_start = self._wait_start = self._waited = 0.0

    def attach(self, trainer: Engine) -> None:
        trainer.register_events(*Records)
        trainer.add_event_handler(Events.EPOCH_STARTED, self._start_clock)
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self._start_waiting)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self._stop_waiting)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._update)

    def state_dict(self) -> dict[str, Any]:
        """Return the open window, for a checkpoint within it; called by all ranks, the same on all."""
        of_ranks = collectives.gather_objects([self._sums.tolist(), self._first_bad.tolist()])
        return {"names": list(self._names), "num_steps": self._num_steps, "of_ranks": of_ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the window; with another number of ranks, rank 0 takes the sums of all."""
        self._names, self._num_steps = state["names"], state["num_steps"]
        sums, bad = zip(*state["of_ranks"], strict=True)
        if len(sums) == collectives.num_ranks():
            local_sums, first_bad = sums[collectives.rank()], bad[collectives.rank()]
        else:
            totals = [sum(values) for values in zip(*sums, strict=True)]
            local_sums = totals if collectives.is_main() else [0.0] * len(totals)
            first_bad = min((values for values in bad if values and values[0] > 0), default=[0.0] * len(bad[0]))
        self._sums = torch.tensor(local_sums, dtype=torch.float64)
        self._first_bad = torch.tensor(first_bad, dtype=torch.float64)

    def _start_clock(self) -> None:
        """Restart the time measurements; the sums may include steps of an earlier process."""
        self._window_start, self._waited, self._num_timed = time.perf_counter(), 0.0, 0

    def _start_waiting(self) -> None:
        self._wait_start = time.perf_counter()

    def _stop_waiting(self) -> None:
        self._waited += time.perf_counter() - self._wait_start

    def _update(self, trainer: Engine) -> None:
        shares: dict[str, Tensor] = trainer.state.output  # type: ignore[assignment]
        values = torch.stack([value.double() for value in shares.values()])
        if self._num_steps == 0:
            self._names = list(shares)
            self._sums = torch.zeros_like(values)
            # The iteration of the first step of the window that is not finite on this rank (or 0), and its values.
            self._first_bad = values.new_zeros(1 + len(values))
        self._num_steps += 1
        self._num_timed += 1
        self._sums = self._sums.to(values.device) + values
        self._first_bad = self._first_bad.to(values.device)
        is_first_bad = ~values.isfinite().all() & (self._first_bad[0] == 0)
        current = torch.cat([self._first_bad.new_full((1,), trainer.state.iteration), values])
        self._first_bad = torch.where(is_first_bad, current, self._first_bad)
        assert trainer.state.epoch_length is not None
        step = (trainer.state.iteration - 1) % trainer.state.epoch_length + 1
        if step % self._log_period == 0 or step == trainer.state.epoch_length:
            self._publish(trainer)
            self._num_steps = 0
            self._start_clock()

    def _publish(self, trainer: Engine) -> None:
        """Sum the shares over the ranks and gather each rank's waiting time and memory, in one reduction."""
        of_ranks = self._sums.new_zeros(collectives.num_ranks(), 2)
        of_ranks[collectives.rank()] = torch.tensor([self._waited, _gpu_memory(self._sums.device)])
        packed = torch.cat([self._sums, of_ranks.flatten()])
        gathered = collectives.sum_over_ranks(packed).tolist()  # waits for the device
        seconds = time.perf_counter() - self._window_start
        means = [value / self._num_steps for value in gathered[: len(self._names)]]
        if not all(map(math.isfinite, means)):
            self._stop(trainer)
        waited, memory = max(gathered[len(self._names) :: 2]), max(gathered[len(self._names) + 1 :: 2])
        trainer.state.metrics = dict(zip(self._names, means, strict=True)) | {
            "lr": self._optimizer.param_groups[0]["lr"],  # that of the weights
            "images_per_second": self._num_timed * self._batch_size / seconds,
            "data_wait": min(waited / seconds, 1.0),
        }
        if memory:
            trainer.state.metrics["gpu_mem_max_mb"] = memory
        trainer.fire_event(Records.TRAIN)

    def _stop(self, trainer: Engine) -> None:
        """Raise on all ranks, with the first step that was not finite on any of them."""
        iteration, *values = min(bad for bad in collectives.gather_objects(self._first_bad.tolist()) if bad[0] > 0)
        # The finite values are one rank's shares, which mean nothing by themselves.
        broken = [(name, value) for name, value in zip(self._names, values, strict=True) if not math.isfinite(value)]
        terms = ", ".join(f"{name} {value:g}" for name, value in broken)
        error = NonFiniteError(
            f"the loss must be finite, got {terms} at iteration {int(iteration)} (epoch {trainer.state.epoch}). Fix: "
            "lower SOLVER.BASE_LR, raise SOLVER.WARMUP_ITERS, or use SOLVER.PRECISION fp32; no checkpoint holds these "
            "weights.",
            key="SOLVER.BASE_LR",
        )
        raise shared(error)


def _gpu_memory(device: torch.device) -> float:
    """Return the most memory that this process has allocated so far, in MiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
