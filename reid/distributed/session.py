"""The process group of a run, from its start to its end."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import ignite.distributed as idist
import torch
import torch.distributed as dist

from reid.distributed.accelerator import build_accelerator, forget_accelerator
from reid.distributed.collectives import errors_shared
from reid.distributed.launch_environment import World
from reid.errors import ReidError, WorldError, shared
from reid.process.signals import Preempted

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode


@contextmanager
def session(world: World, cfg: CfgNode, *, keep_group: bool = False) -> Iterator[Accelerator]:
    """Keep the process group for as long as the context lasts, and yield an accelerator that joined it.

    accelerate owns precision, wrapping and the backward pass; Ignite owns ranks, collectives and devices. A single
    process without a launcher has no process group.

    Args:
        world: Rank of this process, from the launcher.
        cfg: Configuration; MODEL.DEVICE, SOLVER.PRECISION, SOLVER.SHARDING and SOLVER.TIMEOUT_MINUTES are read.
        keep_group: Whether the process group stays until the interpreter exits, for the next session.

    Raises:
        WorldError: There is no GPU for MODEL.DEVICE cuda, this node has fewer GPUs than processes, or a library
            detects other ranks than the launcher set.
    """
    on_gpu = _on_gpu(world, cfg.MODEL.DEVICE)
    if world.has_group and not dist.is_initialized():
        # A minute more than the watchdog waits, which reports the rank that is missing.
        timeout = timedelta(minutes=cfg.SOLVER.TIMEOUT_MINUTES + 1)
        with _slurm_variables_for_ignite(by_srun=world.by_srun):
            idist.initialize("nccl" if on_gpu else "gloo", timeout=timeout)
        if keep_group:
            atexit.register(idist.finalize)
    try:
        _require_same_world("Ignite", idist.get_world_size(), idist.get_rank(), world)
        with errors_shared():
            accelerator = build_accelerator(cfg, on_gpu=on_gpu, num_ranks=world.num_ranks)
        _require_same_world("accelerate", accelerator.num_processes, accelerator.process_index, world)
        yield accelerator
    except (ReidError, Preempted) as error:
        if world.num_ranks > 1 and error.is_shared:
            # torchrun ends all processes with the first that ends, and rank 0 may still be closing its W&B run.
            idist.barrier()
        raise
    finally:
        if world.has_group and not keep_group:
            idist.finalize()
        forget_accelerator()


def _on_gpu(world: World, device: str) -> bool:
    num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if num_gpus == 0 and device == "cuda":
        error = WorldError(
            "MODEL.DEVICE must be auto or cpu on a machine without a GPU that torch can use, got cuda. Fix: set "
            "MODEL.DEVICE to auto or cpu.",
            key="MODEL.DEVICE",
        )
        raise error if world.local_rank == 0 else shared(error)
    if 0 < num_gpus <= world.local_rank:
        error = WorldError(
            f"--nproc_per_node must be at most the {num_gpus} GPUs of the node, got at least {num_gpus + 1} processes. "
            "Fix: lower --nproc_per_node, or set MODEL.DEVICE cpu.",
            key="--nproc_per_node",
        )
        raise error if world.local_rank == num_gpus else shared(error)
    return num_gpus > 0


@contextmanager
def _slurm_variables_for_ignite(*, by_srun: bool) -> Iterator[None]:
    """Adjust Slurm's variables for Ignite, which takes every process in a Slurm job for one of the job's tasks.

    Under torchrun, it would overwrite LOCAL_RANK by the task's. Under srun, it would wait for all tasks of the job,
    although a step may have fewer.
    """
    step_names = {"NTASKS": "NUM_TASKS", "JOB_NUM_NODES": "NUM_NODES", "JOB_NODELIST": "NODELIST"} if by_srun else {}
    adjusted = {f"SLURM_{job}": os.environ[f"SLURM_STEP_{step}"] for job, step in step_names.items()}
    original = {name: os.environ[name] for name in ("SLURM_JOB_ID", *adjusted) if name in os.environ}
    if not by_srun:
        os.environ.pop("SLURM_JOB_ID", None)
    os.environ.update(adjusted)
    try:
        yield
    finally:
        os.environ.update(original)


def _require_same_world(library: str, num_ranks: int, rank: int, world: World) -> None:
    if (num_ranks, rank) != (world.num_ranks, world.rank):
        raise WorldError(
            f"{library} must detect rank {world.rank} of {world.num_ranks}, which the launcher set, got rank {rank} of "
            f"{num_ranks}. Fix: start the processes with torchrun, and unset other variables that set ranks.",
            key="WORLD_SIZE",
        )
