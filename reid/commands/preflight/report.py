"""Report of the command `check`: problems with their fixes, then measured figures of ranks, network and disk."""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from reid.checkpoints.save import checkpoints_in
from reid.commands.preflight.trial import Trial, try_steps
from reid.config.rules import validate_training
from reid.data.datasets import DataSets, open_data_sets
from reid.distributed import collectives
from reid.distributed.link_speed import Link, measure
from reid.errors import ReidError, WorldError, shared
from reid.process.files import disk_errors
from reid.process.signals import Signals
from reid.runs.start_checks import check_start

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

T = TypeVar("T")

logger = logging.getLogger(__name__)

_NUM_WRITTEN = 1 << 24  # bytes of the write test
_SLOW_LINK = 0.5  # share of the median of its kind
_MAX_WAITING = 0.2  # share of a step that may be spent waiting for data
_NUM_FILES = 4  # checkpoints at one time: two last_*.pt, one best_*.pt, and one that is being written


@dataclass
class Report:
    """Problems and figures; the same ranks give the same lines in the same order."""

    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, title: str, *lines: str) -> None:
        for number, line in enumerate(lines):
            self.lines.append(f"{title if number == 0 else '':<12} {line}")

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Return the result of the work, or None if it raises a user error, which is a problem. Called by all ranks."""
        try:
            return work()
        except ReidError as error:
            if collectives.num_ranks() > 1 and not error.is_shared:
                raise  # other ranks would wait
            self.problems.append(str(error))
            return None


def check(cfg: CfgNode, accelerator: Accelerator, signals: Signals) -> None:
    """Verify all that a training needs, and train for a few steps; nothing is left in OUTPUT_DIR.

    Raises:
        WorldError: There are problems, which are in the log.
    """
    del signals  # nothing has to be saved
    report = Report()
    report.attempt(lambda: check_start(cfg))
    _machines(report, accelerator.device)
    fits = report.attempt(lambda: _batch(report, cfg))
    _links(report, measure(accelerator.device))
    data = report.attempt(lambda: open_data_sets(cfg, train=True))
    if data:
        _data(report, data)
    trial = report.attempt(lambda: try_steps(cfg, accelerator, data)) if data and fits else None
    if trial:
        _trial(report, cfg, trial, accelerator.device)
    report.attempt(lambda: _disk(report, Path(cfg.OUTPUT_DIR), trial))
    for number, problem in enumerate(report.problems, start=1):
        logger.info("problem %d: %s", number, problem)
    for line in report.lines:
        logger.info("%s", line)
    if report.problems:
        problems = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        raise shared(WorldError(f"a training must have no problems, got {problems}. Fix: see the list above."))
    logger.info("no problems were found")


def _machines(report: Report, device: torch.device) -> None:
    ranks = collectives.gather_objects(_describe_rank(device))
    per_host = Counter(info["host"] for info in ranks)
    report.add("ranks", f"{len(ranks)} on " + ", ".join(f"{host} ({number})" for host, number in per_host.items()))
    for name in ("device", "versions"):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, info in enumerate(ranks):
            ranks_by_value.setdefault(info[name], []).append(rank)
        if len(ranks_by_value) == 1:
            report.add(name, f"{ranks[0][name]} (all ranks)")
        else:
            lines = [f"{value} (ranks {_numbers(numbers)})" for value, numbers in ranks_by_value.items()]
            report.add(name, *lines)
            report.problems.append(
                f"all ranks must have the same {name}, got {'; '.join(lines)}. Fix: choose equal nodes."
            )
    for info in {info["host"]: info for info in ranks}.values():
        _node(report, info, per_host[info["host"]])


def _node(report: Report, info: dict[str, Any], num_ranks: int) -> None:
    if info["num_gpus"] > num_ranks:
        report.problems.append(
            f"every GPU must have a rank, got {info['num_gpus']} GPUs and {num_ranks} ranks on {info['host']}. Fix: "
            "start more ranks on each node, or request fewer GPUs."
        )
    if info["num_threads"] * num_ranks > info["num_cpus"]:
        report.problems.append(
            f"every thread must have a CPU, got {num_ranks} x {info['num_threads']} threads and {info['num_cpus']} "
            f"CPUs on {info['host']}. Fix: lower OMP_NUM_THREADS, or request more CPUs (--cpus-per-task)."
        )
    if info["gpu_used"] > 0.1:
        report.problems.append(
            f"the GPUs must be free, got {100 * info['gpu_used']:.0f} % of the memory of one on {info['host']} in use. "
            "Fix: end the processes that nvidia-smi shows there."
        )


def _describe_rank(device: torch.device) -> dict[str, Any]:
    names = ["torch", "torchvision", "accelerate", "numpy"]
    versions = [f"{name} {version(name)}" for name in names] + [f"Python {platform.python_version()}"]
    info = {
        "host": platform.node(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "num_gpus": torch.cuda.device_count() if device.type == "cuda" else 0,
        "gpu_used": 0.0,
        "device": f"CPU, {platform.machine()}",
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # The memory that torch itself has reserved is not in use by other processes.
        info["gpu_used"] = max(0.0, 1 - (free + torch.cuda.memory_reserved(device)) / total)
        info["device"] = f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB"
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        versions += [f"CUDA {torch.version.cuda}", f"NCCL {nccl}", f"driver {_driver()}"]
    return {**info, "versions": ", ".join(versions)}


def _driver() -> str:
    try:
        match = re.search(r"Kernel Module.*? (\d\S*)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return "unknown"
    return match[1] if match else "unknown"


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _batch(report: Report, cfg: CfgNode) -> bool:
    with collectives.errors_shared():
        validate_training(cfg, collectives.num_ranks())
    batch, num_ranks, k = cfg.SOLVER.IMS_PER_BATCH, collectives.num_ranks(), cfg.DATALOADER.NUM_INSTANCE
    images = "images" if cfg.DATALOADER.SAMPLER == "softmax" else f"images, {batch // k} identities of {k}"
    parts = f", in {cfg.SOLVER.ACCUMULATE} parts" if cfg.SOLVER.ACCUMULATE > 1 else ""
    report.add("batch", f"{batch} {images}; on each rank {batch // num_ranks}{parts}")
    return True


def _data(report: Report, data: DataSets) -> None:
    for title, benchmarks in (("train", data.train), ("test", data.test)):
        for benchmark in benchmarks:
            splits = ["train"] if title == "train" else [name for name in benchmark.splits if name != "train"]
            counts = [f"{name} {len(benchmark.splits[name])} images" for name in splits]
            report.add(title, f"{benchmark.name}: {', '.join(counts)}")


def _links(report: Report, links: list[Link]) -> None:
    if not links:
        return
    lines = [
        f"{link.name}: {1e3 * link.latency:.2f} ms for 8 bytes, {link.bandwidth / 1e9:.2f} GB/s for 32 MiB"
        for link in links
    ]
    report.add("all-reduce", *lines)
    for kind in (" - ", "within "):
        alike = [link for link in links if kind in link.name]
        median = statistics.median([link.bandwidth for link in alike]) if alike else 0.0
        report.problems += [
            f"all links must be equally fast, got {link.bandwidth / 1e9:.2f} GB/s for {link.name} and a median of "
            f"{median / 1e9:.2f} GB/s. Fix: exclude that node (--exclude), or examine its network."
            for link in alike
            if link.bandwidth < _SLOW_LINK * median
        ]


def _trial(report: Report, cfg: CfgNode, trial: Trial, device: torch.device) -> None:
    report.add(
        "step",
        f"{trial.seconds:.3f} s, {cfg.SOLVER.IMS_PER_BATCH / trial.seconds:.0f} images/s over all ranks, "
        f"{100 * trial.waiting:.0f} % waiting for data",
        f"{_duration(trial.num_steps * trial.seconds)} for an epoch of {trial.num_steps} steps, "
        f"{_duration(cfg.SOLVER.MAX_EPOCHS * trial.num_steps * trial.seconds)} for {cfg.SOLVER.MAX_EPOCHS} epochs, "
        "without evaluations",
    )
    owner, total = "of the process", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        owner, total = "of the GPU", torch.cuda.get_device_properties(device).total_memory
    report.add("memory", f"{_size(trial.memory)} {owner} at most, of {_size(total)}")
    if trial.waiting > _MAX_WAITING:
        report.problems.append(
            f"batches must be ready in time, got a rank that waits for them {100 * trial.waiting:.0f} % of a step. "
            "Fix: set DATALOADER.NUM_WORKERS above 0, request more CPUs, or set DATASETS.NODE_LOCAL_DIR."
        )


def _disk(report: Report, path: Path, trial: Trial | None) -> None:
    """Report free space, speed, and nodes that do not see the same folder; called by all ranks."""
    needed = _NUM_FILES * trial.state if trial else 0
    folder, token, seconds = collectives.from_rank_zero(lambda: _write_test(path))
    is_visible = (folder / token).exists()
    blind = {host for host, visible in collectives.gather_objects((platform.node(), is_visible)) if not visible}

    def clean_up() -> tuple[int, list[Path]]:
        (folder / token).unlink(missing_ok=True)
        return shutil.disk_usage(folder).free, checkpoints_in(path / "checkpoints", "last")

    free, existing = collectives.from_rank_zero(clean_up)
    report.add(
        "OUTPUT_DIR",
        f"{path}: {_size(free)} free, {f'about {_size(needed)} needed, ' if trial else ''}{_size(_NUM_WRITTEN)} "
        f"written in {seconds:.2f} s",
        f"a training would {f'resume from {existing[-1]}' if existing else 'start at epoch 1'}",
    )
    if free < needed:
        report.problems.append(
            f"the disk of OUTPUT_DIR={path} must have room for checkpoints of {_size(needed)}, got {_size(free)}. Fix: "
            "free some space, or choose another OUTPUT_DIR."
        )
    if blind:
        report.problems.append(
            f"OUTPUT_DIR={path} must be visible to all nodes, so that any of them can resume, got a file of rank 0 "
            f"that is missing on {', '.join(sorted(blind))}. Fix: choose an OUTPUT_DIR on a shared file system."
        )


def _write_test(path: Path) -> tuple[Path, str, float]:
    """Write a file in OUTPUT_DIR or its nearest existing parent; return folder, name of the file, and seconds."""
    path = path.absolute()
    folder = next(parent for parent in (path, *path.parents) if parent.exists())
    file = folder / f".write_test.{secrets.token_hex(8)}"
    start = time.perf_counter()
    try:
        with disk_errors(f"OUTPUT_DIR={path}, in {folder},", key="OUTPUT_DIR"), file.open("wb") as stream:
            stream.write(bytes(_NUM_WRITTEN))
            stream.flush()
            os.fsync(stream.fileno())
    except WorldError:
        with suppress(OSError):
            file.unlink()
        raise
    return folder, file.name, time.perf_counter() - start


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
