"""Cost of a training step compared with forward and backward of its backbone, in total and part by part.

    uv run python benchmarks/step.py [--quick] [--threads 1] [--rounds 3]

In total, run in turn: the backbone alone (forward and backward of ready images), a bare loop around the same model
(cross entropy, backward, torch's default optimizer), and the engine of a training with the input, all losses, the norm
of the gradient, meter, records and console, with the settings of each line. Part by part: each part alone, with the
floating-point operations and bytes that it needs. On a GPU 64 images in bfloat16, on a CPU 8 (`--quick`: 16 of a small
model).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from ignite.engine import Engine
from measuring import Cost, costs_in_turn, device
from tables import machine, print_line, table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from reid.config.load import load_config
from reid.data import augment
from reid.data.loaders import Batch, BatchLoader, StoredImages
from reid.data.preprocessing import BatchPreprocessor
from reid.data.samplers import IdentityPlan, TrainBatches
from reid.distributed.accelerator import build_accelerator, clip_gradients, move_model
from reid.hardware import has_fast_bfloat16
from reid.models.reid_model import ReIDModel, build_model
from reid.runs.directory import RunDirectory
from reid.runs.progress import Progress
from reid.training import console, schedule
from reid.training.build import build_training
from reid.training.criterion import Criterion
from reid.training.meters import TrainMeter

NUM_PIDS, IMAGES_PER_PID = 64, 8


class Training(NamedTuple):
    """Everything that a step needs."""

    cfg: CfgNode
    model: ReIDModel
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    preprocessor: BatchPreprocessor
    dataset: StoredImages
    batches: TrainBatches
    trainer: Engine


def build(folder: Path, settings: Sequence[str]) -> Training:
    """Return a training as `reid.training.train` assembles it, without what acts at most once an epoch."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate allows one precision in a process
    GradientState._reset_state()
    cfg = load_config(None, [*settings, "MODEL.PRETRAIN_CHOICE=none", f"OUTPUT_DIR={folder}", "WANDB.ENABLE=no"])
    accelerator = build_accelerator(cfg, on_gpu=torch.cuda.is_available(), num_ranks=1)
    torch.manual_seed(0)
    model = build_model(cfg, NUM_PIDS)
    move_model(model, cfg, accelerator.device)
    dataset, batches = images_of(cfg)
    on_device = (
        torch.from_numpy(dataset.images(np.arange(len(dataset)))).to(device())
        if accelerator.device.type == "cuda"
        else None
    )
    preprocessor = BatchPreprocessor(cfg, accelerator.device, on_device)
    training = build_training(cfg, accelerator, model, preprocessor)
    trainer, wrapped, optimizer = training.trainer, training.wrapped, training.optimizer
    meter = TrainMeter(log_period=cfg.SOLVER.LOG_PERIOD, batch_size=cfg.SOLVER.IMS_PER_BATCH, optimizer=optimizer)
    schedule.set_learning_rate_by_epoch(trainer, optimizer, cfg.SOLVER)
    schedule.set_sampler_position(trainer, batches)
    schedule.train_mode_by_epoch(trainer, wrapped)
    meter.attach(trainer)
    console.attach(trainer, RunDirectory(folder), Progress())
    return Training(cfg, model, wrapped, optimizer, accelerator, preprocessor, dataset, batches, trainer)


def images_of(cfg: CfgNode) -> tuple[StoredImages, TrainBatches]:
    size = tuple(cfg.INPUT.SIZE_TRAIN)
    recipe = augment.Recipe(size, flip_probability=0.5, padding=cfg.INPUT.PADDING, erasing_probability=0.5, seed=0)
    pids = np.repeat(np.arange(NUM_PIDS), IMAGES_PER_PID)
    pixels = np.random.default_rng(0).integers(0, 256, (len(pids), *size, 3), dtype=np.uint8)
    num_pids = cfg.SOLVER.IMS_PER_BATCH // cfg.DATALOADER.NUM_INSTANCE
    plan = IdentityPlan(pids, num_pids=num_pids, num_instances=cfg.DATALOADER.NUM_INSTANCE, seed=0)
    return StoredImages([pixels], pids, recipe, with_images=not torch.cuda.is_available()), TrainBatches(
        plan, rank=0, num_ranks=1
    )


def steps_of(training: Training, num_steps: int) -> Callable[[], object]:
    loader = BatchLoader(training.dataset, training.batches, prefetch=False, pin_memory=False)
    return lambda: training.trainer.run(loader, max_epochs=1, epoch_length=num_steps)


def backbone_of(training: Training, num_steps: int) -> Callable[[], object]:
    """Return only forward and backward of prepared images."""
    images = training.preprocessor.for_training(first_batch(training))

    def work() -> None:
        for _ in range(num_steps):
            backbone(training, images)
            training.model.zero_grad()

    return work


def backbone(training: Training, images: Tensor) -> None:
    with training.accelerator.autocast():
        feature_map = training.model.base(images)
    torch.autograd.backward(feature_map.float().mean())


def bare_loop(training: Training, num_steps: int) -> Callable[[], object]:
    """Return the simplest loop: prepared images, cross entropy, backward, torch's default optimizer."""
    images = training.preprocessor.for_training(first_batch(training)).contiguous()
    pids = first_batch(training).pids.to(images.device)
    model = training.model
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=5e-4)

    def work() -> None:
        model.train()
        for _ in range(num_steps):
            with training.accelerator.autocast():
                logits = model(images).logits
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(logits.float(), pids))
            optimizer.step()

    return work


def first_batch(training: Training) -> Batch:
    return training.dataset.batch(next(iter(training.batches)))


def in_total(folder: Path, settings: list[str], variants: dict[str, list[str]], num_steps: int, rounds: int) -> None:
    """Measure some steps of every way, in turn."""
    ours = build(folder / "ours", settings)
    plain = build(folder / "plain", [*settings, "MODEL.CHANNELS_LAST=no", "SOLVER.FUSED=no"])
    ways = {"backbone alone (limit)": backbone_of(ours, num_steps), "bare loop": bare_loop(plain, num_steps)}
    ways["training, defaults"] = steps_of(ours, num_steps)
    for name, more in variants.items():
        ways[f"training, {name}"] = steps_of(build(folder / name, [*settings, *more]), num_steps)
    for work in ways.values():
        work()  # warm up
    costs = costs_in_turn(ways, rounds)
    batch = ours.cfg.SOLVER.IMS_PER_BATCH
    limit, loop = costs["backbone alone (limit)"], costs["bare loop"]
    rows = []
    for name, cost in costs.items():
        ratios = time_of(cost) / time_of(limit), time_of(loop) / time_of(cost)
        rows.append(
            [name, cost.cpu / num_steps, cost.seconds / num_steps, batch * num_steps / cost.cpu, *ratios, cost.memory]
        )
    table(
        f"{ours.cfg.MODEL.NAME}, batch {batch}, {' x '.join(map(str, ours.cfg.INPUT.SIZE_TRAIN))}, "
        f"{ours.cfg.SOLVER.PRECISION}, on "
        f"{ours.accelerator.device.type}; {num_steps} steps in turn, median of {rounds}; ratios of {TIME}",
        [
            "way",
            "CPU s a step",
            "s a step",
            "images per CPU s",
            "to the backbone",
            "times the bare loop's rate",
            "GB above",
        ],
        rows,
    )


TIME = "seconds" if torch.cuda.is_available() else "CPU seconds"  # that count


def time_of(cost: Cost) -> float:
    return cost.seconds if torch.cuda.is_available() else cost.cpu


def part_by_part(folder: Path, settings: list[str], repeats: int) -> None:
    training = build(folder / "parts", settings)
    training.wrapped.train()
    planned = next(iter(training.batches))
    batch = training.dataset.batch(planned)
    images, pids = training.preprocessor.for_training(batch), training.preprocessor.to_device(batch.pids)
    counter = FlopCounterMode(display=False)
    with counter:
        backbone(training, images)
    flops = counter.get_total_flops()
    output = training.wrapped(images)
    given = type(output)(*(field.detach().requires_grad_() for field in output))
    criterion = Criterion(training.cfg)
    size, num_features = images.shape[0], training.model.num_features
    parameters = sum(p.numel() for p in training.model.parameters() if p.requires_grad)
    pixels, classes = images[0].numel(), NUM_PIDS
    shares = {f"loss {i}": torch.ones((), device=images.device) for i in range(5)}
    meter = TrainMeter(log_period=10**9, batch_size=size, optimizer=training.optimizer)
    idle = Engine(lambda engine, batch: shares)
    meter.attach(idle)
    parts: dict[str, tuple[Callable[[], object], float, float]] = {  # work, FLOP, bytes
        "backbone, forward and backward": (lambda: backbone(training, images), flops, 3 * 4 * parameters),
        "gather and augment": (
            lambda: training.preprocessor.for_training(training.dataset.batch(planned)),
            3 * pixels * size,
            5 * pixels * size,
        ),
        "losses, forward and backward": (
            lambda: torch.autograd.backward(criterion(given, pids, None).to_minimize),
            2 * size * size * num_features + 10 * size * (classes + num_features),
            4 * size * (6 * num_features + 4 * classes) + 4 * 4 * size * size,
        ),
        "norm of the gradient": (
            lambda: clip_gradients(training.accelerator, training.wrapped, 0),
            2 * parameters,
            4 * parameters,
        ),
        "optimizer": (training.optimizer.step, 12 * parameters, 28 * parameters),
        "meter and engine": (lambda: idle.run([None] * 2, max_epochs=1), 0, 0),
    }
    measured = {name: (median_cost(work, repeats), flop, num_bytes) for name, (work, flop, num_bytes) in parts.items()}
    first = time_of(next(iter(measured.values()))[0])
    rows: list[list[object]] = []
    for name, (cost, flop, num_bytes) in measured.items():
        rows.append(
            [
                name,
                1e3 * cost.cpu,
                1e3 * cost.seconds,
                f"{100 * time_of(cost) / first:.1f} %",
                flop / 1e9,
                num_bytes / 1e6,
            ]
        )
    rest = sum(time_of(cost) for cost, _, _ in measured.values()) - first
    rows.append(["all but the backbone", "", "", f"{100 * rest / first:.1f} %", "", ""])
    table(
        f"Part by part, {training.cfg.MODEL.NAME}, batch {size}, D = {num_features}, C = {classes}, {parameters:,} "
        f"parameters; median of {repeats}",
        ["part", "CPU ms", "ms", f"{TIME}, to the backbone's", "GFLOP", "MB moved at least"],
        rows,
    )


def median_cost(work: Callable[[], object], repeats: int) -> Cost:
    work()
    return costs_in_turn({"": work}, repeats)[""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="resnet18 at 64x32, seconds")
    parser.add_argument("--threads", type=int, default=1, help="waiting threads count as CPU seconds on busy machines")
    parser.add_argument("--rounds", type=int, default=3, help="that the medians are of")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("ignite").addHandler(logging.NullHandler())
    print_line(f"step.py{' --quick' if arguments.quick else ''} --threads {arguments.threads}: {machine()}")
    on_gpu = torch.cuda.is_available()
    settings, num_steps = [f"SOLVER.IMS_PER_BATCH={16 if arguments.quick else 8}", "SOLVER.LOG_PERIOD=1"], 1
    if on_gpu:
        settings, num_steps = ["SOLVER.IMS_PER_BATCH=64", "SOLVER.PRECISION=bf16", "SOLVER.LOG_PERIOD=20"], 40
    if arguments.quick:
        settings, num_steps = [*settings, "MODEL.NAME=resnet18", "INPUT.SIZE_TRAIN=(64,32)"], 2
    variants = {"no fused optimizer": ["SOLVER.FUSED=no"]}
    variants["other memory format"] = [f"MODEL.CHANNELS_LAST={'no' if on_gpu else 'yes'}"]
    if on_gpu or has_fast_bfloat16():
        other = "fp32" if on_gpu else "bf16"
        variants[other] = [f"SOLVER.PRECISION={other}"]
        if not on_gpu:
            variants["bf16, channels last"] = ["SOLVER.PRECISION=bf16", "MODEL.CHANNELS_LAST=yes"]
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        in_total(Path(folder), settings, variants, num_steps, arguments.rounds)
        part_by_part(Path(folder), settings, 3 if arguments.quick else 5)


if __name__ == "__main__":
    main()
