"""Data sets by name: a folder or a table in, the train, query and gallery splits out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from reid.config.benchmark_names import DEFAULTS, PARTS, BenchmarkOptions, Part, is_table
from reid.data.benchmarks.cuhk03 import cuhk03, prepare_cuhk03
from reid.data.benchmarks.list_files import msmt17, vehicleid
from reid.data.benchmarks.market_layout import dukemtmc, market1501, occluded_duke, synthetic, veri
from reid.data.benchmarks.sources import documented
from reid.data.benchmarks.splits import Benchmark
from reid.data.benchmarks.tables import read_table
from reid.errors import SettingsError

Reader = Callable[[Path, BenchmarkOptions, Sequence[Part]], Benchmark]

BENCHMARKS: dict[str, Reader] = {
    "market1501": market1501,
    "dukemtmc": dukemtmc,
    "msmt17": msmt17,
    "cuhk03": cuhk03,
    "veri": veri,
    "occluded_duke": occluded_duke,
    "vehicleid": vehicleid,
    "synthetic": synthetic,
}

logger = logging.getLogger(__name__)


def load_benchmark(
    name: str, root_dir: Path, options: BenchmarkOptions = DEFAULTS, *, parts: Sequence[Part] = PARTS
) -> Benchmark:
    """The benchmark called `name` from below `root_dir`; warns where its numbers are not the documented ones.

    Args:
        name: a key of `BENCHMARKS`, or the path of a table, as `read_table` takes it.
        root_dir: the folder that holds the benchmarks' folders.
        options: which of its published forms to read.
        parts: what to read; the other splits are empty, and their files need not be there.

    Raises:
        SettingsError: no benchmark has this name.
        DataError, WorldError: as its reader says.
    """
    benchmark = read_benchmark(name, root_dir, options, parts)
    if differing := differences(benchmark, options):
        logger.warning(
            "%s in %s is not as documented (%s): images are missing, or it is another version; see: "
            "launch/data.py check %s",
            name,
            benchmark.root,
            "; ".join(differing),
            name,
        )
    return benchmark


def read_benchmark(name: str, root_dir: Path, options: BenchmarkOptions, parts: Sequence[Part]) -> Benchmark:
    """As `load_benchmark`, without the comparison with the documented numbers."""
    if is_table(name):
        return read_table(name, root_dir, parts)
    if name not in BENCHMARKS:
        raise SettingsError(
            f"DATASETS.NAMES must be one of {', '.join(BENCHMARKS)}, or the path of a .csv or .parquet table, "
            f"got {name!r}; choose one of these",
            key="DATASETS.NAMES",
        )
    return BENCHMARKS[name](root_dir, options, parts)


def prepare_benchmark(name: str, root_dir: Path, options: BenchmarkOptions = DEFAULTS) -> None:
    """What must be done once before a benchmark can be read; `load_benchmark` would do it too, in every process.

    Raises:
        DataError, WorldError: as its reader says.
    """
    if name == "cuhk03":
        prepare_cuhk03(root_dir, options)


def differences(benchmark: Benchmark, options: BenchmarkOptions) -> list[str]:
    """What each split that was read has of the documented numbers, where it has another number."""
    found = []
    for name, (pids, images) in documented(benchmark.name, options).items():
        split = benchmark.splits[name]
        num_pids, num_images = len(np.unique(split.pids)), len(split)
        if num_images and (num_pids, num_images) != (pids, images or num_images):
            of_images = f" of {images:,}" if images else ""
            found.append(f"{name} has {num_images:,}{of_images} images and {num_pids:,} of {pids:,} identities")
    return found
