"""The check story: what a training would find on these nodes, measured; problems first, with remedies."""

from __future__ import annotations

import logging
import os
import platform
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
from reid.process.signals import Signals
from reid.runs.start_checks import check_start

if TYPE_CHECKING:
    from accelerate import Accelerator
    from yacs.config import CfgNode

T = TypeVar("T")

logger = logging.getLogger(__name__)

_WRITTEN = 1 << 24  # bytes of the write test
_SLOW_LINK = 0.5  # of the median of its kind
_WAITING = 0.2  # share of a step that may be spent waiting for data
_NUM_FILES = 4  # of a state: two last_*.pt, a best_*.pt, and one that is being written


@dataclass
class Report:
    """What was found; the same lines in the same order for the same world."""

    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, title: str, *lines: str) -> None:
        for number, line in enumerate(lines):
            self.lines.append(f"{title if number == 0 else '':<12} {line}")

    def attempt(self, work: Callable[[], T]) -> T | None:
        """What the work gives; what would end a training is a problem here, and gives None. Called by all ranks."""
        try:
            return work()
        except ReidError as error:
            if collectives.num_ranks() > 1 and not error.is_shared:
                raise  # other ranks would wait
            self.problems.append(str(error))
            return None


def check(cfg: CfgNode, accelerator: Accelerator, signals: Signals) -> None:
    """Looks at all that a training needs, and trains for a few steps; nothing is left in OUTPUT_DIR.

    Raises:
        WorldError: there are problems; they are in the log.
    """
    del signals  # there is nothing to save
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
        problems = "1 problem was" if len(report.problems) == 1 else f"{len(report.problems)} problems were"
        raise shared(WorldError(f"{problems} found before training; see the list above"))
    logger.info("no problems were found")


# ---- who is there ----


def _machines(report: Report, device: torch.device) -> None:
    ranks = collectives.gather_objects(_own_facts(device))
    per_host = Counter(facts["host"] for facts in ranks)
    report.add("ranks", f"{len(ranks)} on " + ", ".join(f"{host} ({number})" for host, number in per_host.items()))
    for name in ("device", "versions"):
        held_by: dict[str, list[int]] = {}
        for rank, facts in enumerate(ranks):
            held_by.setdefault(facts[name], []).append(rank)
        if len(held_by) == 1:
            report.add(name, f"{ranks[0][name]} (all ranks)")
        else:
            report.add(name, *(f"{value} (ranks {_numbers(who)})" for value, who in held_by.items()))
            values = "; ".join(f"{value} on ranks {_numbers(who)}" for value, who in held_by.items())
            report.problems.append(f"all ranks should have the same {name}, but there are {values}; choose equal nodes")
    for facts in {facts["host"]: facts for facts in ranks}.values():
        _node(report, facts, per_host[facts["host"]])


def _node(report: Report, facts: dict[str, Any], num_ranks: int) -> None:
    if facts["num_gpus"] > num_ranks:
        report.problems.append(
            f"every GPU should have a rank, but {facts['host']} has {facts['num_gpus']} GPUs and {num_ranks} ranks; "
            "start more ranks on each node, or ask for fewer GPUs"
        )
    if facts["num_threads"] * num_ranks > facts["num_cpus"]:
        report.problems.append(
            f"the ranks of {facts['host']} have {num_ranks} x {facts['num_threads']} threads for {facts['num_cpus']} "
            "CPUs, and will wait for each other; lower OMP_NUM_THREADS, or ask for more CPUs (--cpus-per-task)"
        )
    if facts["gpu_used"] > 0.1:
        report.problems.append(
            f"the GPUs should be free, but {100 * facts['gpu_used']:.0f} % of the memory of one on {facts['host']} is "
            "in use; end the processes that nvidia-smi shows there"
        )


def _own_facts(device: torch.device) -> dict[str, Any]:
    names = ["torch", "torchvision", "accelerate", "numpy"]
    versions = [f"{name} {version(name)}" for name in names] + [f"Python {platform.python_version()}"]
    facts = {
        "host": platform.node(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "num_gpus": torch.cuda.device_count() if device.type == "cuda" else 0,
        "gpu_used": 0.0,
        "device": f"CPU, {platform.machine()}",
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What torch itself holds by now is not others'.
        facts["gpu_used"] = max(0.0, 1 - (free + torch.cuda.memory_reserved(device)) / total)
        facts["device"] = f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB"
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        versions += [f"CUDA {torch.version.cuda}", f"NCCL {nccl}", f"driver {_driver()}"]
    return {**facts, "versions": ", ".join(versions)}


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module", 1)[1].split()
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in words if word[0].isdigit()), "unknown")


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _batch(report: Report, cfg: CfgNode) -> bool:
    with collectives.errors_shared():
        validate_training(cfg, collectives.num_ranks())
    batch, num_ranks, k = cfg.SOLVER.IMS_PER_BATCH, collectives.num_ranks(), cfg.DATALOADER.NUM_INSTANCE
    of = "images" if cfg.DATALOADER.SAMPLER == "softmax" else f"images, {batch // k} identities of {k}"
    parts = f", in {cfg.SOLVER.ACCUMULATE} parts" if cfg.SOLVER.ACCUMULATE > 1 else ""
    report.add("batch", f"{batch} {of}; on each rank {batch // num_ranks}{parts}")
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
        usual = statistics.median([link.bandwidth for link in alike]) if alike else 0.0
        report.problems += [
            f"all links should be equally fast, but {link.name} has {link.bandwidth / 1e9:.2f} GB/s and the median is "
            f"{usual / 1e9:.2f} GB/s; leave that node out (--exclude), or look at its network"
            for link in alike
            if link.bandwidth < _SLOW_LINK * usual
        ]


# ---- a few steps ----


def _trial(report: Report, cfg: CfgNode, trial: Trial, device: torch.device) -> None:
    report.add(
        "step",
        f"{trial.seconds:.3f} s, {cfg.SOLVER.IMS_PER_BATCH / trial.seconds:.0f} images/s over all ranks, "
        f"{100 * trial.waiting:.0f} % waiting for data",
        f"{_duration(trial.num_steps * trial.seconds)} for an epoch of {trial.num_steps} steps, "
        f"{_duration(cfg.SOLVER.MAX_EPOCHS * trial.num_steps * trial.seconds)} for {cfg.SOLVER.MAX_EPOCHS} epochs, "
        "without evaluations",
    )
    whose, total = "of the process", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        whose, total = "of the GPU", torch.cuda.get_device_properties(device).total_memory
    report.add("memory", f"{_size(trial.memory)} {whose} at most, of {_size(total)}")
    if trial.waiting > _WAITING:
        report.problems.append(
            f"batches should be there in time, but a rank waits for them {100 * trial.waiting:.0f} % of a step; set "
            "DATALOADER.NUM_WORKERS above 0, ask for more CPUs, or set DATASETS.NODE_LOCAL_DIR"
        )


# ---- where it is written ----


def _disk(report: Report, path: Path, trial: Trial | None) -> None:
    """Room, speed and whether all nodes see the same folder; called by all ranks."""
    needed = _NUM_FILES * trial.state if trial else 0
    folder, token, seconds = collectives.from_rank_zero(lambda: _write_test(path))
    sees_it = (folder / token).exists()
    blind = {host for host, sees in collectives.gather_objects((platform.node(), sees_it)) if not sees}
    collectives.from_rank_zero(lambda: (folder / token).unlink(missing_ok=True))
    free = collectives.from_rank_zero(lambda: shutil.disk_usage(folder).free)
    found = collectives.from_rank_zero(lambda: [str(file) for file in checkpoints_in(path / "checkpoints", "last")])
    report.add(
        "OUTPUT_DIR",
        f"{path}: {_size(free)} free, {f'about {_size(needed)} needed, ' if trial else ''}{_size(_WRITTEN)} written in "
        f"{seconds:.2f} s",
        f"a training would {f'go on from {found[-1]}' if found else 'begin anew'}",
    )
    if free < needed:
        report.problems.append(
            f"the disk of OUTPUT_DIR={path} must have room for checkpoints of {_size(needed)}, but {_size(free)} are "
            "free; make room, or choose another OUTPUT_DIR"
        )
    if blind:
        report.problems.append(
            f"all nodes should see OUTPUT_DIR={path}, so that any of them can go on, but {', '.join(sorted(blind))} "
            "does not see what rank 0 writes there; choose an OUTPUT_DIR on a shared file system"
        )


def _write_test(path: Path) -> tuple[Path, str, float]:
    """Writes a file where the run's folder is or will be; the folder, the file's name, and the seconds."""
    path = path.absolute()
    folder = next(above for above in (path, *path.parents) if above.exists())
    file = folder / f".write_test.{secrets.token_hex(8)}"
    start = time.perf_counter()
    try:
        with file.open("wb") as stream:
            stream.write(bytes(_WRITTEN))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        with suppress(OSError):
            file.unlink()
        raise WorldError(
            f"OUTPUT_DIR={path} must be a folder that can be written to, but in {folder}: {error.strerror or error}; "
            "choose another OUTPUT_DIR",
            key="OUTPUT_DIR",
        ) from error
    return folder, file.name, time.perf_counter() - start


# ---- words ----


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
