"""Looks at the benchmarks on this machine: where they come from, how they must lie, and what is wrong with yours."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from reid.config.benchmark_names import NAMES, PARTS, BenchmarkOptions, is_table
from reid.config.load import load_config
from reid.config.rules import benchmark_options
from reid.data.benchmarks.catalogue import differences, read_benchmark
from reid.data.benchmarks.sources import SOURCES, documented
from reid.data.benchmarks.splits import Benchmark, is_folder, shown
from reid.data.benchmarks.tables import COLUMNS, SPLITS
from reid.data.store import fault_of_image
from reid.errors import ReidError, SettingsError
from reid.process.files import printable
from reid.process.logs import write_output
from reid.process.text_tables import format_table

if TYPE_CHECKING:
    from yacs.config import CfgNode

FINE, WRONG = 0, 2  # exit codes

_SETTING = re.compile(r"[A-Z][A-Z0-9_.]*=")
_EPILOG = """\
Without NAME, every benchmark whose folder is found is checked, and the others are described.
Exit code 0: all that was asked for is fine; 2: something is missing or wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `check [NAME ...] [--root DIR] [--images] [KEY=VALUE ...]`; returns the exit code."""
    given = _build_parser().parse_intermixed_args(arguments)
    overrides = [item for item in given.items if _SETTING.match(item)]
    names = [item for item in given.items if item not in overrides]
    if given.root is not None:
        overrides.append(f"DATASETS.ROOT_DIR={given.root}")
    if names:
        overrides.append(f"DATASETS.NAMES={names}")
    try:
        cfg = load_config(given.config_file, overrides)
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return WRONG
    asked = cfg.DATASETS.NAMES if names else NAMES
    are_fine = [_check(name, cfg, is_asked_for=bool(names), open_images=given.images) for name in asked]
    return FINE if all(are_fine) else WRONG


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument(
        "items", nargs="*", metavar="NAME | KEY=VALUE", help=f"{', '.join(NAMES)}, a .csv or .parquet table; a setting"
    )
    parser.add_argument("--root", metavar="DIR", help="the folder of the benchmarks' folders (DATASETS.ROOT_DIR)")
    parser.add_argument("--config_file", "--config-file", metavar="FILE", help="YAML file with settings")
    parser.add_argument("--images", action="store_true", help="open every image too")
    return parser


def _check(name: str, cfg: CfgNode, *, is_asked_for: bool, open_images: bool) -> bool:
    """Says all about one benchmark; returns whether there is nothing wrong."""
    root_dir, options = Path(cfg.DATASETS.ROOT_DIR), benchmark_options(cfg)
    _describe(name, root_dir)
    if not is_asked_for and not any(is_folder(root_dir / home) for home in SOURCES[name].homes):
        _say("  yours: absent", "")
        return True
    try:
        benchmark = read_benchmark(name, root_dir, options, PARTS)
    except ReidError as error:
        _say(f"  wrong: {error}")
        _describe_parts(name, root_dir, options)
        _say("")
        return False
    _say(f"  yours: {benchmark.root}", *_rows(benchmark, options))
    faults = differences(benchmark, options)
    if open_images:
        faults += _unreadable_images(benchmark)
    _say(*(f"  wrong: {fault}" for fault in faults), *([] if faults else ["  fine"]), "")
    return not faults


def _describe(name: str, root_dir: Path) -> None:
    _say(name)
    if is_table(name):
        _say(f"  layout: a table with the columns {', '.join(COLUMNS)}; split is one of {', '.join(SPLITS)}")
        return
    source = SOURCES[name]
    _say(f"  paper: {source.paper}", f"  get it: {source.get}", f"  layout, below DATASETS.ROOT_DIR ({root_dir}):")
    _say(f"    {' or '.join(f'{home}/' for home in source.homes)}")
    _say(*(f"      {line}" for line in source.tree.splitlines()))


def _describe_parts(name: str, root_dir: Path, options: BenchmarkOptions) -> None:
    """What can be used of a benchmark that is not whole."""
    for part in PARTS:
        try:
            benchmark = read_benchmark(name, root_dir, options, [part])
        except ReidError:
            continue
        _say(f"  but what {part} needs is in {benchmark.root}:", *_rows(benchmark, options))


def _rows(benchmark: Benchmark, options: BenchmarkOptions) -> list[str]:
    counts = documented(benchmark.name, options)
    rows = [["", "ids", "images", "cameras", "documented"]]
    for name, split in benchmark.splits.items():
        if len(split):
            num_pids, num_cameras = len(np.unique(split.pids)), len(np.unique(split.camids))
            known = "-"
            if name in counts:
                pids, images = counts[name]
                known = f"{pids:,} ids" + (f", {images:,} images" if images else "")
            rows.append([name, f"{num_pids:,}", f"{len(split):,}", f"{num_cameras:,}", known])
    return [f"    {line}" for line in format_table(rows, "<>>><").splitlines()]


def _unreadable_images(benchmark: Benchmark) -> list[str]:
    paths = sorted({path for split in benchmark.splits.values() for path in split.paths})
    Image.init()  # before there are threads, as in the store
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reasons = list(
            tqdm(pool.map(fault_of_image, paths), total=len(paths), unit="img", disable=not sys.stderr.isatty())
        )
    bad = [f"{path} ({reason})" for path, reason in zip(paths, reasons, strict=True) if reason is not None]
    return [f"{len(bad)} of {len(paths)} images cannot be read: {shown(bad)}"] if bad else []


def _say(*lines: str) -> None:
    for line in lines:
        write_output(printable(line) + "\n")
