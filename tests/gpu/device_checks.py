"""Trainings of a few steps in this process, on any device."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from ignite.engine import Engine
from program import _FORKS, TIMEOUT, free_port
from torch import Tensor, nn
from yacs.config import CfgNode

from reid.config.load import load_config
from reid.data.loaders import Batch
from reid.distributed.accelerator import build_accelerator, move_model
from reid.distributed.sync_batchnorm import synchronize_batchnorm
from reid.models.reid_model import ReIDModel
from reid.training.build import build_training

NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is False"
)
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])

HEIGHT, WIDTH, BATCH, PIDS = 32, 16, 16, 4
BASE = [f"SOLVER.IMS_PER_BATCH={BATCH}", f"INPUT.SIZE_TRAIN=({HEIGHT},{WIDTH})", "INPUT.PADDING=2"]
BASE += [f"INPUT.SIZE_TEST=({HEIGHT},{WIDTH})", "SOLVER.BASE_LR=0.01", "SOLVER.WARMUP_ITERS=0"]


@dataclass
class Training:
    """A model in training, and what each step gave."""

    cfg: CfgNode
    accelerator: Accelerator
    model: ReIDModel
    optimizer: torch.optim.Optimizer
    trainer: Engine
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def run(self, num_steps: int) -> None:
        for batch in batches(num_steps):
            self.trainer.run([batch], max_epochs=1)
            self.losses.append(float(self.trainer.state.output["loss"]))
            self.norms.append(float(self.trainer.state.output["grad_norm"]))

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}


def settings(device: torch.device, *overrides: str) -> CfgNode:
    return load_config(None, [*BASE, f"MODEL.DEVICE={device.type}", *overrides])


def tiny_model(*, with_centers: bool = False) -> ReIDModel:
    """Two strided convolutions with BatchNorm, the same weights each time."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16)]
    options = {"bnneck": True, "embed_after_neck": True, "with_centers": with_centers, "freeze_bn": False}
    return ReIDModel(nn.Sequential(*layers), 16, PIDS, **options)


def batches(num_batches: int) -> list[Batch]:
    """Return batches of random images, some of which are flipped, shifted and erased."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_batches, BATCH, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator)
    pids = torch.arange(PIDS).repeat_interleave(BATCH // PIDS)
    drawn = torch.tensor([[0, 2, 2, 0, 0, 0, 0], [1, 0, 4, 3, 2, 10, 5]], dtype=torch.int32).repeat(BATCH // 2, 1)
    return [Batch(part, pids, torch.arange(BATCH), drawn) for part in images]


def accelerate(cfg: CfgNode, device: torch.device) -> Accelerator:
    """Build the accelerator of a separate run; accelerate would refuse another device or precision than before."""
    forget_accelerator()
    return build_accelerator(cfg, on_gpu=device.type == "cuda", num_ranks=1)


def forget_accelerator() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def build(device: torch.device, *overrides: str) -> Training:
    """Build a training of the tiny model, as `reid.training.train` does.

    SOLVER.PRECISION fp16 is refused on a CPU. There, the loss is scaled all the same, and gradients are rounded to
    float16, so that they overflow.
    """
    is_emulated = device.type == "cpu" and "SOLVER.PRECISION=fp16" in overrides
    if is_emulated:  # without the fused step, as where fp16 is real
        overrides = (*(override for override in overrides if not override.endswith("fp16")), "SOLVER.FUSED=no")
    cfg = settings(device, *overrides)
    accelerator = accelerate(cfg, device)
    if is_emulated:
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    model = tiny_model(with_centers=cfg.MODEL.IF_WITH_CENTER).train()
    move_model(model, cfg, accelerator.device)
    training = build_training(cfg, accelerator, model)
    if is_emulated:
        accelerator.state._mixed_precision = "fp16"  # so that gradients are unscaled before their norm is taken
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient.half().float())
    return Training(cfg, accelerator, model, training.optimizer, training.trainer)


def trained(device: torch.device, *overrides: str, num_steps: int = 6) -> Training:
    training = build(device, *overrides)
    training.run(num_steps)
    return training


def assert_same_state(training: Training, expected: Training) -> None:
    """Compare weights and statistics; relative to each entry's largest value, or to 0.001 if that is larger."""
    state, other = training.state(), expected.state()
    assert list(state) == list(other)
    for name, value in other.items():
        difference = float((state[name].double() - value.double()).abs().max())
        assert difference <= 1e-6 * max(float(value.double().abs().max()), 1e-3), name


# ---- two ranks on one device ----


def of_two_ranks(work: Callable[[str], Any], device: str) -> list[Any]:
    """Return the results of two processes that share a device, over gloo: NCCL refuses two ranks on one GPU."""
    results, port = _FORKS.SimpleQueue(), free_port()
    processes = [_FORKS.Process(target=_rank, args=(work, device, rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0, 0]
    return [result for _, result in sorted(results.get() for _ in processes)]


def _rank(work: Callable[[str], Any], device: str, rank: int, port: int, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    idist.initialize("gloo")
    results.put((rank, work(device)))
    idist.finalize()


def batchnorm_of_rank(device: str) -> tuple[str, float]:
    """Return the type of the synchronizing BatchNorm, and its distance from one over the images of both ranks."""
    generator = torch.Generator().manual_seed(0)
    images, factors = torch.randn(2, 6, 4, 5, 3, generator=generator, dtype=torch.float64).to(device)
    part = slice(0, 4) if idist.get_rank() == 0 else slice(4, 6)

    def run(model: nn.Module, part: slice) -> list[Tensor]:
        inputs = images[part].clone().requires_grad_()
        outputs = model(inputs)
        (outputs * factors[part]).sum().backward()
        layer = model[0]  # type: ignore[index]
        return [outputs, inputs.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]

    alone, shared = (nn.Sequential(nn.BatchNorm2d(4)).to(device, torch.float64) for _ in range(2))
    shared = synchronize_batchnorm(shared)
    expected, actual = run(alone, slice(0, 6)), run(shared, part)
    expected[:2] = [value[part] for value in expected[:2]]
    actual[2:4] = [idist.all_reduce(gradient.clone()) for gradient in actual[2:4]]
    worst = max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True))
    return type(shared[0]).__name__, worst
