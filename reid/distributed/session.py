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
    """The process group from start to end (none where a single process was started), and accelerate joined to it.

    accelerate owns precision, wrapping and the backward pass; ranks, collectives and devices are Ignite's.

    Args:
        world: what the launcher told this process.
        cfg: the whole configuration; MODEL.DEVICE, SOLVER.PRECISION and SOLVER.TIMEOUT_MINUTES are read.

    Raises:
        WorldError: no GPU where one is asked for, fewer GPUs than processes on this node, or a library that does not
            see the world that the launcher made.
    """
    on_gpu = _on_gpu(world, cfg.MODEL.DEVICE)
    if world.has_group and not dist.is_initialized():
        # A minute more than the watchdog waits, which can say who is missing and where.
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
    if device == "cpu":
        return False
    if not torch.cuda.is_available():
        if device == "cuda":
            error = WorldError(
                "MODEL.DEVICE is cuda, but torch finds no GPU on this machine; use MODEL.DEVICE auto or cpu",
                key="MODEL.DEVICE",
            )
            raise error if world.local_rank == 0 else shared(error)
        return False
    num_gpus = torch.cuda.device_count()
    if world.local_rank >= num_gpus:
        error = WorldError(
            f"every process needs a GPU of its own, but {num_gpus + 1} or more processes were started on a node with "
            f"{num_gpus}; lower --nproc_per_node, or set MODEL.DEVICE cpu",
            key="--nproc_per_node",
        )
        raise error if world.local_rank == num_gpus else shared(error)
    return True


@contextmanager
def _slurm_variables_for_ignite(*, by_srun: bool) -> Iterator[None]:
    """Ignite takes every process in a Slurm job for one of the job's tasks.

    Where torchrun made the ranks, it would overwrite LOCAL_RANK by the task's; and the tasks of a step may be fewer
    than those that the job asked for, for which it would wait.
    """
    if by_srun:
        step = {"NTASKS": "NUM_TASKS", "JOB_NUM_NODES": "NUM_NODES", "JOB_NODELIST": "NODELIST"}
        seen = {f"SLURM_{job}": os.environ[f"SLURM_STEP_{own}"] for job, own in step.items()}
    else:
        seen = {}
    ours = {name: os.environ[name] for name in ("SLURM_JOB_ID", *seen) if name in os.environ}
    if not by_srun:
        os.environ.pop("SLURM_JOB_ID", None)
    os.environ.update(seen)
    try:
        yield
    finally:
        os.environ.update(ours)


def _require_same_world(library: str, num_ranks: int, own_rank: int, world: World) -> None:
    if (num_ranks, own_rank) != (world.num_ranks, world.rank):
        raise WorldError(
            f"{library} must see rank {world.rank} of {world.num_ranks} as the launcher made it, but it sees rank "
            f"{own_rank} of {num_ranks}, and the processes would train side by side; start them with torchrun, and "
            "unset other variables that speak of ranks",
            key="WORLD_SIZE",
        )
