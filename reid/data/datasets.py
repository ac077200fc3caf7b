"""Benchmarks that the settings name: those to train on, joined to one training set, and those to test on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reid.config.benchmark_names import PARTS, Part
from reid.config.rules import benchmark_options
from reid.data.benchmarks.catalogue import load_benchmark, prepare_benchmark
from reid.data.benchmarks.splits import Benchmark, Split, fingerprint
from reid.data.synthetic import generate
from reid.distributed import collectives
from reid.errors import SettingsError, shared

if TYPE_CHECKING:
    from yacs.config import CfgNode

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DataSets:
    """Benchmarks of a command.

    Attributes:
        train: Benchmarks to train on; none for an evaluation.
        test: Benchmarks to test on. The first one chooses the best checkpoint.
    """

    train: tuple[Benchmark, ...]
    test: tuple[Benchmark, ...]

    @property
    def num_train_pids(self) -> int:
        """Return the number C of classes to train."""
        return sum(benchmark.num_train_pids for benchmark in self.train)

    def fingerprint_of_training(self) -> str:
        """Return the SHA-256 (hex) of the training images, see `splits.fingerprint`."""
        return _digest(fingerprint(benchmark.train) for benchmark in self.train)

    def fingerprint_of_tests(self) -> str:
        return _digest(fingerprint(split) for b in self.test for split in (b.query, b.gallery))


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def open_data_sets(cfg: CfgNode, *, train: bool) -> DataSets:
    """Open the benchmarks of DATASETS.NAMES (to train) and TEST.DATASETS (to test; the same if it is empty).

    All ranks call it. The synthetic benchmark is generated if it is missing.

    Raises:
        DataError: A benchmark is incomplete or inconsistent.
        WorldError: The ranks see different images.
    """
    to_train = tuple(cfg.DATASETS.NAMES) if train else ()
    to_test = tuple(cfg.TEST.DATASETS or cfg.DATASETS.NAMES)
    root_dir, options = Path(cfg.DATASETS.ROOT_DIR), benchmark_options(cfg)
    opened = {}
    for name in dict.fromkeys(to_train + to_test):
        if name == "synthetic":
            _generate(cfg, root_dir / name)
        parts: list[Part] = [part for part in PARTS if name in (to_train if part == "train" else to_test)]
        collectives.once_per_node(partial(prepare_benchmark, name, root_dir, options))
        with collectives.errors_shared():
            opened[name] = load_benchmark(name, root_dir, options, parts=parts)
        logger.info("%s", opened[name].statistics())
    _validate_names(opened)
    data = DataSets(tuple(opened[name] for name in to_train), tuple(opened[name] for name in to_test))
    collectives.require_same_on_all_ranks(
        {
            "the fingerprint of the training images": data.fingerprint_of_training(),
            "the fingerprint of the test images": data.fingerprint_of_tests(),
        },
        key="DATASETS.ROOT_DIR",
    )
    return data


def _validate_names(opened: Mapping[str, Benchmark]) -> None:
    """Require unique benchmark names, which scores and stores are named by: two tables may have the same one."""
    setting_of: dict[str, str] = {}
    for setting, benchmark in opened.items():
        other = setting_of.setdefault(benchmark.name, setting)
        if other != setting:
            raise shared(
                SettingsError(
                    f"DATASETS.NAMES and TEST.DATASETS must name benchmarks of different names, got {other} and "
                    f"{setting}, both called {benchmark.name}. Fix: rename one of them.",
                    key="DATASETS.NAMES",
                )
            )


def join_training(benchmarks: Sequence[Benchmark]) -> Split:
    """Join the training sets: labels 0..C-1 and cameras of a benchmark follow those of the benchmarks before it.

    No person and no camera is taken to be the same in two benchmarks.
    """
    pids, camids, num_pids, num_cameras = [], [], 0, 0
    for benchmark in benchmarks:
        split = benchmark.train
        pids.append(split.pids + num_pids)
        camids.append(split.camids + num_cameras)
        num_pids += benchmark.num_train_pids
        num_cameras += int(split.camids.max()) + 1
    paths = tuple(path for benchmark in benchmarks for path in benchmark.train.paths)
    return Split(paths, np.concatenate(pids), np.concatenate(camids))


def _generate(cfg: CfgNode, folder: Path) -> None:
    sizes = cfg.DATASETS.SYNTHETIC
    collectives.once_per_node(
        lambda: generate.generate(
            folder,
            num_train_pids=sizes.NUM_TRAIN_PIDS,
            num_test_pids=sizes.NUM_TEST_PIDS,
            images_per_pid=sizes.IMAGES_PER_PID,
            num_cameras=sizes.NUM_CAMERAS,
            seed=sizes.SEED,
        )
    )
