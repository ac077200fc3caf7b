"""Precision and wrapping for training, by accelerate, joined to the process group that stands."""

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
    """The owner of precision, wrapping and the backward pass.

    Args:
        cfg: the whole configuration; SOLVER.PRECISION and SOLVER.SHARDING are read.
        on_gpu: of this run.
        num_ranks: of this run.

    Raises:
        SettingsError: accelerate would silently ignore a setting on a CPU.
    """
    precision = cfg.SOLVER.PRECISION
    if precision == "fp16" and not on_gpu:
        raise SettingsError(
            "SOLVER.PRECISION fp16 needs a GPU, and this run is on a CPU; use fp32 or bf16", key="SOLVER.PRECISION"
        )
    if cfg.SOLVER.SHARDING == "fsdp" and not (on_gpu and num_ranks > 1):
        got = f"{num_ranks} rank" if on_gpu else "a CPU"
        raise SettingsError(
            f"SOLVER.SHARDING fsdp needs several GPUs, and this run is on {got}; use none", key="SOLVER.SHARDING"
        )
    if precision == "bf16" and not has_bf16(on_gpu=on_gpu):
        device = "GPU" if on_gpu else "CPU"
        logger.info("SOLVER.PRECISION bf16: this %s has no instructions for it, and is slower than with fp32", device)
    # Without it accelerate sets the number of threads itself, with a warning; torch has set them already.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision="no" if precision in ("fp32", "fp64") else precision,
        # Micro-batches are the engine's own: accelerate knows no loss over several of them.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        fsdp_plugin=fsdp_plugin() if cfg.SOLVER.SHARDING == "fsdp" else None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def forget_accelerator() -> None:
    """Allow another `build_accelerator` in this process: accelerate keeps the first one's settings for ever."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def has_bf16(*, on_gpu: bool) -> bool:
    """Whether the device multiplies bfloat16 itself; a convolution took 20 times as long on a CPU with AVX2 only."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return platform.machine() not in ("x86_64", "AMD64") or has_fast_bfloat16()  # of others it is not known


def move_model(model: nn.Module, cfg: CfgNode, device: torch.device) -> None:
    """Move the model to the device, in the number type and memory format that it computes in."""
    dtype = torch.float64 if cfg.SOLVER.PRECISION == "fp64" else torch.float32
    model.to(device=device, dtype=dtype)
    choice = cfg.MODEL.CHANNELS_LAST  # on a CPU its BatchNorm is less exact
    if choice == "yes" or (choice == "auto" and device.type == "cuda"):
        model.to(memory_format=torch.channels_last)


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 with one group for every module of a million parameters or more."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=1_000_000,
        cpu_ram_efficient_loading=False,  # every rank has made the same weights from the same seed or file
        state_dict_type="FULL_STATE_DICT",
    )


def full_tensors(value: Any) -> Any:
    """The same value with sharded tensors put together; called by all ranks. `state_dict()`s are meant."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(full_tensors, value))
    return value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor where `like` is sharded; else the tensor itself."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes over what `whole` made of another optimiser's state dict, sharded as this one's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_parameters = {
        index: {
            name: shard_like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    # How the step is computed is this run's own matter: torch would take over that of the other, which may have had
    # another device.
    groups = [
        {**saved, **{name: own[name] for name in ("fused", "foreach") if name in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": of_parameters, "param_groups": groups})


def fix_gradient_buckets(wrapped: nn.Module, size: tuple[int, int]) -> None:
    """One backward pass before the first step, of which nothing else remains; called by all ranks.

    DistributedDataParallel lays its buckets out anew behind its first backward pass, and on more than two ranks another
    layout sums in another order. So the first step behind a resume would differ in its last bits from that of a run
    that was not interrupted.

    Args:
        wrapped: by `wrap`; anything but DistributedDataParallel needs none of this.
        size: H and W of an image, in pixels.
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
    """BatchNorm's running statistics are afterwards what they were."""
    buffers = [buffer for layer in model.modules() if isinstance(layer, _BatchNorm) for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Ranks may use the model independently of each other in here, as in an evaluation of unequal parts."""
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
    """Model and optimiser as training uses them; accelerate would shard a loader again and step a schedule W times.

    Raises:
        WorldError: there is no compiler to compile with.
    """
    if compiled and accelerator.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise shared(
            WorldError(
                "MODEL.COMPILE needs a C++ compiler on a CPU, but there is none; install g++, or set it to no",
                key="MODEL.COMPILE",
            )
        )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        # BatchNorm statistics are equal on all ranks (SyncBN), or broadcast before an evaluation; centers are equal.
        # Set here, as the name of the argument depends on torch's version.
        wrapped.broadcast_buffers = False
    if compiled:
        wrapped.compile()  # in place: parameter names stay as they are, and evaluation uses the model as it is
    return wrapped, optimizer


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
    """Clips the gradients and returns their 2-norm before, all together: a scalar on the device; nothing waits for it.

    The gradients are those of the global batch, so the norm is the same on every rank and for any number of them.

    Args:
        accelerator: which wrapped the model.
        model: wrapped, behind its backward pass.
        max_norm: the largest norm; 0: not clipped.
    """
    if max_norm:
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    else:
        accelerator.unscale_gradients()  # of fp16
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
    whole_norm: Tensor = full_tensors(norm.detach())
    return whole_norm
