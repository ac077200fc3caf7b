"""Benchmarks by name: in goes a folder or a table, out come the splits train, query and gallery."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from reid.config.benchmark_names import DEFAULTS, NAMES, PARTS, BenchmarkOptions, Part, is_table
from reid.data.benchmarks.cuhk03 import cuhk03, prepare_cuhk03
from reid.data.benchmarks.list_files import msmt17, vehicleid
from reid.data.benchmarks.market_layout import FOLDERS_OF, read_market_layout
from reid.data.benchmarks.sources import documented
from reid.data.benchmarks.splits import Benchmark
from reid.data.benchmarks.tables import read_table
from reid.errors import SettingsError

Reader = Callable[[Path, BenchmarkOptions, Sequence[Part]], Benchmark]

BENCHMARKS: dict[str, Reader] = {
    **{name: partial(read_market_layout, name) for name in FOLDERS_OF},
    "msmt17": msmt17,
    "cuhk03": cuhk03,
    "vehicleid": vehicleid,
}

logger = logging.getLogger(__name__)


def load_benchmark(
    name: str, root_dir: Path, options: BenchmarkOptions = DEFAULTS, *, parts: Sequence[Part] = PARTS
) -> Benchmark:
    """Return a benchmark; log a warning if its numbers differ from the documented ones.

    Example:
        market = load_benchmark("market1501", Path("data"), parts=["test"])

    Args:
        name: Key of `BENCHMARKS`, or path of a table, see `read_table`.
        root_dir: Folder that holds the benchmarks' folders.
        options: Published forms to read.
        parts: Parts to read; the other splits are empty, and their files need not exist.

    Raises:
        SettingsError: No benchmark has this name.
        DataError, WorldError: See the reader.
    """
    benchmark = read_benchmark(name, root_dir, options, parts)
    if differing := differences(benchmark, options):
        logger.warning(
            "%s in %s is not as documented (%s): images are missing, or it is another version; see: reid data check %s",
            name,
            benchmark.root,
            "; ".join(differing),
            name,
        )
    return benchmark


def read_benchmark(name: str, root_dir: Path, options: BenchmarkOptions, parts: Sequence[Part]) -> Benchmark:
    """Return a benchmark as `load_benchmark` does, without comparing its numbers."""
    if is_table(name):
        return read_table(name, root_dir, parts)
    if name not in BENCHMARKS:
        raise SettingsError(
            f"DATASETS.NAMES must be one of {', '.join(NAMES)}, or the path of a .csv or .parquet table, "
            f"got {name!r}. Fix: choose one of these.",
            key="DATASETS.NAMES",
        )
    return BENCHMARKS[name](root_dir, options, parts)


def prepare_benchmark(name: str, root_dir: Path, options: BenchmarkOptions = DEFAULTS) -> None:
    """Do once what `load_benchmark` would otherwise do in every process: extract the images of CUHK03.

    Raises:
        DataError, WorldError: See the reader.
    """
    if name == "cuhk03":
        prepare_cuhk03(root_dir, options)


def differences(benchmark: Benchmark, options: BenchmarkOptions) -> list[str]:
    """Return a phrase for each split that was read and differs from the documented numbers."""
    phrases = []
    for name, (pids, images) in documented(benchmark.name, options).items():
        split = benchmark.splits[name]
        num_pids, num_images = len(np.unique(split.pids)), len(split)
        if num_images and (num_pids, num_images) != (pids, images or num_images):
            of_images = f" of {images:,}" if images else ""
            phrases.append(f"{name} has {num_images:,}{of_images} images and {num_pids:,} of {pids:,} identities")
    return phrases
