"""Precision, wrapping and clipping by accelerate, joined to the existing process group."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from reid.errors import SettingsError, WorldError, shared
from reid.hardware import has_fast_bfloat16

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)


def build_accelerator(cfg: CfgNode, *, on_gpu: bool, num_ranks: int) -> Accelerator:
    """Build the owner of precision, wrapping and the backward pass.

    Args:
        cfg: Configuration; SOLVER.PRECISION and SOLVER.SHARDING are read.
        on_gpu: Whether the run is on GPUs.
        num_ranks: Number of ranks of the run.

    Raises:
        SettingsError: accelerate would silently ignore a setting on a CPU.
    """
    precision = cfg.SOLVER.PRECISION
    if precision == "fp16" and not on_gpu:
        raise SettingsError(
            "SOLVER.PRECISION fp16 needs a GPU, got a CPU. Fix: set it to fp32 or bf16.", key="SOLVER.PRECISION"
        )
    if cfg.SOLVER.SHARDING == "fsdp" and not (on_gpu and num_ranks > 1):
        got = f"{num_ranks} rank" if on_gpu else "a CPU"
        raise SettingsError(
            f"SOLVER.SHARDING fsdp needs several GPUs, got {got}. Fix: set it to none.", key="SOLVER.SHARDING"
        )
    if precision == "bf16" and not has_bf16(on_gpu=on_gpu):
        device = "GPU" if on_gpu else "CPU"
        logger.info("SOLVER.PRECISION bf16 is slower than fp32 on this %s, which has no instructions for it", device)
    # Otherwise accelerate sets the number of threads, with a warning, although torch has set them already.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision="no" if precision in ("fp32", "fp64") else precision,
        # The training step accumulates micro-batches: accelerate supports no loss over several of them.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        fsdp_plugin=fsdp_plugin() if cfg.SOLVER.SHARDING == "fsdp" else None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def forget_accelerator() -> None:
    """Allow another `build_accelerator` in this process: accelerate keeps the settings of the first one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def has_bf16(*, on_gpu: bool) -> bool:
    """Return whether the device multiplies bfloat16: a convolution took 20 times as long on a CPU with only AVX2."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return platform.machine() not in ("x86_64", "AMD64") or has_fast_bfloat16()  # unknown for other CPUs


def move_model(model: nn.Module, cfg: CfgNode, device: torch.device) -> None:
    """Move the model to the device, in the number type and memory format that it computes in."""
    dtype = torch.float64 if cfg.SOLVER.PRECISION == "fp64" else torch.float32
    model.to(device=device, dtype=dtype)
    choice = cfg.MODEL.CHANNELS_LAST  # on a CPU its BatchNorm is less exact
    if choice == "yes" or (choice == "auto" and device.type == "cuda"):
        model.to(memory_format=torch.channels_last)


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """Return FSDP2's configuration, with one group for every module of a million parameters or more."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=1_000_000,
        cpu_ram_efficient_loading=False,  # every rank has the same weights, from the same seed or file
        state_dict_type="FULL_STATE_DICT",
    )


def full_tensors(value: Any) -> Any:
    """Return a state dict with its sharded tensors gathered; all ranks call it."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(full_tensors, value))
    return value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor if `like` is sharded, else the tensor."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load another optimizer's state dict of full tensors, sharded like this optimizer's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_parameters = {
        index: {
            name: shard_like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    # torch would also load how the step is computed, although the other run may have used another device.
    groups = [
        {**saved, **{name: group[name] for name in ("fused", "foreach") if name in group}}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": of_parameters, "param_groups": groups})


def fix_gradient_buckets(wrapped: nn.Module, size: tuple[int, int]) -> None:
    """Run a backward pass before the first step, with no other effect than the bucket layout; all ranks call it.

    DistributedDataParallel changes the layout of its buckets after its first backward pass, and on more than two ranks
    another layout sums in another order. So the first step after a resume would differ in its last bits from that of an
    uninterrupted run.

    Args:
        wrapped: Model that `wrap` returned; only DistributedDataParallel needs this pass.
        size: H and W of an image in pixels.
    """
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return
    weight = next(wrapped.parameters())
    images = torch.rand(2, 3, *size, dtype=weight.dtype, device=weight.device)
    with preserve_batchnorm_statistics(wrapped.train()):  # type: ignore[no-untyped-call]
        torch.stack([output.sum() for output in wrapped(images)]).sum().backward()  # type: ignore[no-untyped-call]
    wrapped.zero_grad()


@contextmanager
def preserve_batchnorm_statistics(model: nn.Module) -> Iterator[None]:
    """Restore BatchNorm's running statistics at the end of the context."""
    buffers = [buffer for layer in model.modules() if isinstance(layer, _BatchNorm) for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Let ranks use the model independently of each other, as in an evaluation of unequal parts."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    yield
    for module in shards:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def wrap(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, *, compiled: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap model and optimizer only: accelerate would shard a loader again and step a schedule W times.

    Raises:
        WorldError: There is no compiler for `compiled`.
    """
    if compiled and accelerator.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise shared(
            WorldError(
                "MODEL.COMPILE needs a C++ compiler on a CPU, got none. Fix: install g++, or set it to no.",
                key="MODEL.COMPILE",
            )
        )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        # BatchNorm statistics are equal on all ranks (SyncBN), or broadcast before an evaluation; centers are equal.
        # Set as an attribute, because the name of the argument depends on torch's version.
        wrapped.broadcast_buffers = False
    if compiled:
        wrapped.compile()  # in place: keeps the parameter names, and the uncompiled model for evaluation
    return wrapped, optimizer


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients and return their total 2-norm before, a scalar on the device, without waiting for it.

    The gradients are those of the global batch, so the norm is the same on every rank and for any number of ranks.

    Args:
        accelerator: Accelerator that wrapped the model.
        model: Wrapped model after its backward pass.
        max_norm: Largest norm; 0 to clip nothing.
    """
    if max_norm:
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    else:
        accelerator.unscale_gradients()  # fp16
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
    total_norm: Tensor = full_tensors(norm.detach())
    return total_norm
