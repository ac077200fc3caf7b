"""Describe the benchmarks, and verify those on this machine: source, folder layout, what is missing or wrong."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

_SETTING = re.compile(r"[A-Z][A-Z0-9_.]*=")
_EPILOG = """\
Without NAME, every benchmark whose folder exists is verified, and the others are described.
Exit code 0: nothing is wrong; 2: something is missing or wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `check [NAME ...] [--root DIR] [--images] [KEY=VALUE ...]` and return its exit code."""
    parsed = _build_parser().parse_intermixed_args(arguments)
    overrides = [item for item in parsed.items if _SETTING.match(item)]
    names = [item for item in parsed.items if item not in overrides]
    if parsed.root is not None:
        overrides.append(f"DATASETS.ROOT_DIR={parsed.root}")
    if names:
        overrides.append(f"DATASETS.NAMES={names}")
    try:
        cfg = load_config(parsed.config_file, overrides)
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    results = [
        _verify(name, cfg, is_required=bool(names), open_images=parsed.images)
        for name in (cfg.DATASETS.NAMES if names else NAMES)
    ]
    return 0 if all(results) else 2


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument(
        "items", nargs="*", metavar="NAME | KEY=VALUE", help=f"{', '.join(NAMES)}, a .csv or .parquet table; a setting"
    )
    parser.add_argument("--root", metavar="DIR", help="folder of the benchmarks' folders (DATASETS.ROOT_DIR)")
    parser.add_argument("--config_file", "--config-file", metavar="FILE", help="YAML file with settings")
    parser.add_argument("--images", action="store_true", help="open every image too")
    return parser


def _verify(name: str, cfg: CfgNode, *, is_required: bool, open_images: bool) -> bool:
    """Print a report on one benchmark; return whether nothing is wrong."""
    root_dir, options = Path(cfg.DATASETS.ROOT_DIR), benchmark_options(cfg)
    _print(name, *_description(name, root_dir))
    if not is_required and not any(is_folder(root_dir / home) for home in SOURCES[name].homes):
        _print("  yours: absent", "")
        return True
    try:
        benchmark = read_benchmark(name, root_dir, options, PARTS)
    except ReidError as error:
        _print(f"  wrong: {error}", *_usable_parts(name, root_dir, options), "")
        return False
    _print(f"  yours: {benchmark.root}", *_rows(benchmark, options))
    faults = differences(benchmark, options) + (_unreadable_images(benchmark) if open_images else [])
    _print(*([f"  wrong: {fault}" for fault in faults] or ["  fine"]), "")
    return not faults


def _description(name: str, root_dir: Path) -> list[str]:
    if is_table(name):
        return [f"  layout: a table with the columns {', '.join(COLUMNS)}; split is one of {', '.join(SPLITS)}"]
    source = SOURCES[name]
    return [
        f"  paper: {source.paper}",
        f"  get it: {source.get}",
        f"  layout, below DATASETS.ROOT_DIR ({root_dir}):",
        f"    {' or '.join(f'{home}/' for home in source.homes)}",
        *(f"      {line}" for line in source.tree.splitlines()),
    ]


def _usable_parts(name: str, root_dir: Path, options: BenchmarkOptions) -> list[str]:
    """Return lines on the parts of an incomplete benchmark that can still be used."""
    lines = []
    for part in PARTS:
        with suppress(ReidError):
            benchmark = read_benchmark(name, root_dir, options, [part])
            lines += [f"  but complete for {part}: {benchmark.root}", *_rows(benchmark, options)]
    return lines


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
    Image.init()  # loads the plug-ins of PIL, which two threads must not do at once
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        progress = tqdm(pool.map(fault_of_image, paths), total=len(paths), unit="img", disable=not sys.stderr.isatty())
        unreadable = [f"{path} ({reason})" for path, reason in zip(paths, progress, strict=True) if reason is not None]
    return [f"{len(unreadable)} of {len(paths)} images cannot be read: {shown(unreadable)}"] if unreadable else []


def _print(*lines: str) -> None:
    write_output("".join(f"{printable(line)}\n" for line in lines))
