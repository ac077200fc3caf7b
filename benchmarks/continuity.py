"""Cost of surviving an interruption: the checkpoint, reading it back, and the time from a kill to the next step.

    uv run python benchmarks/continuity.py [--quick] [--folder FOLDER]

The checkpoint: how long training pauses for the copy into host memory, how long the write takes, and how much a CPU
training step slows down during it, compared with saving within the step. Reading: with and without verifying every
byte. Restarts (`continuity_restarts.py`): the real program under torchrun, after SIGKILL of a rank, SIGKILL of all
processes and SIGTERM; the time until it trains again, by cause, and the lost steps. FOLDER is on the disk to be
measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from continuity_restarts import restarts
from ignite.engine import Engine
from tables import machine, median_seconds, print_line, seconds_of, table
from torch import Tensor, nn

from reid.checkpoints.save import BackgroundWriter, host_copy, save_atomically
from reid.checkpoints.weights import read_file
from reid.config.load import load_config
from reid.models.reid_model import ReIDModel, build_model
from reid.runs.progress import Progress
from reid.training.checkpointing import Checkpoints
from reid.training.meters import TrainMeter
from reid.training.optim import build_optimizer

NUM_PIDS = 751  # Market-1501's
IMAGES = (8, 3, 64, 32)  # small, so that a write lasts for several steps


def trained_model(name: str) -> tuple[ReIDModel, torch.optim.Optimizer, Callable[[], None]]:
    """Return a model with the complete state of Adam, its optimizer and a training step."""
    torch.manual_seed(0)
    cfg = load_config(None, [f"MODEL.NAME={name}"])
    model = build_model(cfg, NUM_PIDS).train()
    optimizer = build_optimizer(cfg.SOLVER, model)
    images, pids = torch.randn(IMAGES), torch.arange(IMAGES[0])

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images).logits, pids))
        optimizer.step()

    step()
    return model, optimizer, step


def tensors_in(content: Any) -> list[Tensor]:
    if isinstance(content, Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def write_plainly(file: Path, values: Tensor) -> None:
    """Write the same bytes, then fsync once: the limit of the disk."""
    with file.open("wb", buffering=0) as stream:
        left = values.numpy().data.cast("B")
        while left:
            left = left[stream.write(left) :]
        os.fsync(stream.fileno())


def checkpoint_cost(folder: Path, name: str, repeats: int) -> Path:
    """Print tables of the cost of saving; return the written file."""
    model, optimizer, step = trained_model(name)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    tensors = tensors_in(content)
    size = sum(tensor.nbytes for tensor in tensors)
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    kept, file = torch.zeros_like(flat), folder / "last_0001_00000001.pt"
    copied = host_copy(content)

    meter = TrainMeter(log_period=1, batch_size=1, optimizer=optimizer)
    training: Any = SimpleNamespace(model=model, optimizer=optimizer, scaler=None, meter=meter)
    checkpoints = Checkpoints(load_config(None, []), folder, "none", training, Progress())
    trainer = Engine(lambda engine, batch: None)
    trainer.state.iteration, trainer.state.epoch_length = 1, 1
    memcpy, memory = (median_seconds(work, repeats) for work in (lambda: kept.copy_(flat), flat.clone))
    disk = median_seconds(lambda: write_plainly(folder / "plain", flat), repeats)
    (folder / "plain").unlink()
    stalls = []
    for _ in range(repeats):
        stalls.append(seconds_of(lambda: checkpoints.save(trainer)))
        checkpoints.finish()
    times = {
        "pause of the training: Checkpoints.save": (statistics.median(stalls), memcpy),
        "of which host_copy": (median_seconds(lambda: host_copy(content), repeats), memcpy),
        "the same into fresh memory, in one piece": (memory, memcpy),
        "write in the background: save_atomically": (
            median_seconds(lambda: save_atomically(file, copied), repeats),
            disk,
        ),
        "saving within the step instead": (median_seconds(lambda: save_atomically(file, content), repeats), disk),
    }
    rows = [[what, time_, size / time_ / 1e9, limit, time_ / limit] for what, (time_, limit) in times.items()]
    table(
        f"A checkpoint of {name} with Adam: {len(tensors)} tensors, {size / 1e6:.1f} MB, a file of "
        f"{file.stat().st_size / 1e6:.1f} MB; limits of the same run: memcpy {size / memcpy / 1e9:.2f} GB/s, plain "
        f"write and fsync {size / disk / 1e9:.2f} GB/s; median of {repeats}, 1 thread",
        ["what", "s", "GB/s", "limit s (memcpy or disk)", "ratio to limit"],
        rows,
    )
    step_while_writing(step, lambda: save_atomically(file, copied), num_rounds=2 * repeats)
    return file


def step_while_writing(step: Callable[[], None], write: Callable[[], None], num_rounds: int) -> None:
    """Time blocks of steps in turn, without writes and during successive writes, and the longest pause of Python."""
    writer = BackgroundWriter()
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}  # whether it writes -> wall and CPU seconds
    for number in range(6 * num_rounds):
        writes = number // 3 % 2 == 1
        if writes and not writer.is_busy:
            writer.wait()
            writer.start("last", write)
        elif not writes:
            writer.wait()
        start, cpu_start = time.perf_counter(), time.thread_time()  # of the training thread alone
        step()
        times[writes].append((time.perf_counter() - start, time.thread_time() - cpu_start))
    writer.wait()
    quiet, busy = ([statistics.median(column) for column in zip(*times[w], strict=True)] for w in (False, True))
    rows = [[what, quiet[i], busy[i], busy[i] / quiet[i]] for i, what in enumerate(("wall", "CPU, training thread"))]
    table(
        f"A training step of 8 images, 64x32, while one write follows the other, median of {3 * num_rounds}, 1 thread",
        ["seconds a step", "without", "while writing", "ratio (limit 1)"],
        rows,
    )
    writer.start("last", write)
    worst = longest_pause(lambda: writer.is_busy)
    writer.wait()
    until = time.perf_counter() + 2
    print_line(
        f"\nlongest time in which the main thread could run no Python: {1000 * worst:.0f} ms during a write, "
        f"{1000 * longest_pause(lambda: time.perf_counter() < until):.0f} ms in 2 s without one"
    )


def longest_pause(continues: Callable[[], bool]) -> float:
    """Return the longest pause of a Python loop: the writer's thread may hold the interpreter, or the core."""
    worst, last = 0.0, time.perf_counter()
    while continues():
        now = time.perf_counter()
        worst, last = max(worst, now - last), now
    return worst


def reading_cost(file: Path, repeats: int) -> None:
    def verify() -> None:
        with zipfile.ZipFile(file) as archive:
            archive.testzip()

    bare = median_seconds(file.read_bytes, repeats)
    times = {
        "bare read of the file (limit)": bare,
        "CRC-32 of every tensor alone": median_seconds(verify, repeats),
        "torch.load, which verifies nothing": median_seconds(lambda: torch.load(file, weights_only=True), repeats),
        "read_file: all of it": median_seconds(lambda: read_file(file, "OUTPUT_DIR"), repeats),
    }
    size = file.stat().st_size
    rows = [[what, time_, size / time_ / 1e9, time_ / bare] for what, time_ in times.items()]
    title = f"Reading {size / 1e6:.1f} MB back, verified, from the page cache, median of {repeats}"
    table(title, ["what", "s", "GB/s", "ratio to limit"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and one interruption, under a minute")
    parser.add_argument(
        "--folder", type=Path, default=None, help="on the disk to be measured; default: the temporary one"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as under torchrun, and the other core is left to the writer
    name, repeats = ("resnet18", 3) if arguments.quick else ("resnet50", 5)
    with tempfile.TemporaryDirectory(prefix="bench_", dir=arguments.folder) as folder:
        print_line(f"continuity.py{' --quick' if arguments.quick else ''}: {machine()}, files in {folder}")
        file = checkpoint_cost(Path(folder), name, repeats)
        reading_cost(file, repeats)
        restarts(Path(folder), quick=arguments.quick)


if __name__ == "__main__":
    main()
