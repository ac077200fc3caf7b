"""Table of the results of several runs, with their mean and standard deviation."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reid.process.logs import write_output
from reid.process.text_tables import format_table

_METRICS = ("mAP", "mINP", "rank-1", "rank-5", "rank-10")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `summarize OUTPUT_DIR...` and return its exit code: 1 if a run has no result."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="folder of a run")
    results = {str(run): read_result(run) for run in parser.parse_args(arguments).runs}
    existing = {run: result for run, result in results.items() if result is not None}
    for missing in sorted(results.keys() - existing.keys()):
        sys.stderr.write(f"warning: {missing}/result.json does not exist or is no result; the run is left out\n")
    if existing:
        write_output(table(existing) + "\n")
    return 0 if len(existing) == len(results) else 1


def read_result(run: Path) -> dict[str, Any] | None:
    """Return the result of the last evaluation of a run, or None if there is none."""
    try:
        content = json.loads((run / "result.json").read_text(encoding="utf-8"))
        return content if isinstance(content["mAP"], float) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return one line for each run, then mean and sample standard deviation (n - 1), for each test set in percent.

    Args:
        results: Content of result.json by run; it holds the scores of the first test set, and with several test sets
            those of each by name.
    """
    by_set: dict[str, dict[str, dict[str, Any]]] = {}
    for run, result in results.items():
        for name, scores in result.get("datasets", {}).items():
            by_set.setdefault(name, {})[run] = scores
    return "\n\n".join(_block(name, by_set[name]) for name in sorted(by_set)) or _block("run", results)


def _block(title: str, results: dict[str, dict[str, Any]]) -> str:
    metrics = [metric for metric in _METRICS if all(metric in result for result in results.values())]
    rows = [[title, "epoch", *metrics]]
    for run, result in results.items():
        epoch = result.get("epoch")
        rows.append([run, "" if epoch is None else str(epoch), *_percentages(result[metric] for metric in metrics)])
    columns = [[result[metric] for result in results.values()] for metric in metrics]
    rows.append([f"mean of {len(results)}", "", *_percentages(map(statistics.mean, columns))])
    if len(results) > 1:
        rows.append(["standard deviation", "", *_percentages(map(statistics.stdev, columns))])
    return format_table(rows, "<" + ">" * (1 + len(metrics)))


def _percentages(fractions: Iterable[float]) -> list[str]:
    return [f"{100 * fraction:.2f}" for fraction in fractions]
