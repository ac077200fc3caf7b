"""Mean and spread of the results of several runs, as a table."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reid.logs import answer

_METRICS = ("mAP", "mINP", "rank-1", "rank-5", "rank-10")
INCOMPLETE = 1  # exit code: a run has no result


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line `summarize OUTPUT_DIR...`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="folder of a run")
    runs = parser.parse_args(arguments).runs
    results = {run: read_result(run) for run in runs}
    found = {str(run): result for run, result in results.items() if result is not None}
    for missing in (run for run in runs if results[run] is None):
        sys.stderr.write(f"warning: {missing}/result.json does not exist or is no result; the run is left out\n")
    if found:
        answer(table(found) + "\n")
    return 0 if len(found) == len(results) else INCOMPLETE


def read_result(run: Path) -> dict[str, Any] | None:
    """The last evaluation of a run; None where there is none."""
    try:
        content = json.loads((run / "result.json").read_text(encoding="utf-8"))
        return content if isinstance(content["mAP"], float) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line for each run, then mean and standard deviation (of a sample: n - 1) for each test set, in percent.

    Args:
        results: run -> what result.json holds; the first test set's scores, and all sets' by name if there are more.
    """
    sets = sorted({name for result in results.values() for name in result.get("datasets", {})})
    if not sets:
        return _block("run", results)
    parts = {
        name: {run: result["datasets"][name] for run, result in results.items() if name in result.get("datasets", {})}
        for name in sets
    }
    return "\n\n".join(_block(name, part) for name, part in parts.items())


def _block(title: str, results: dict[str, dict[str, Any]]) -> str:
    metrics = [metric for metric in _METRICS if all(metric in result for result in results.values())]
    width = max(len(name) for name in (title, "standard deviation", *results))
    lines = [f"{title:<{width}}" + "".join(f"{metric:>9}" for metric in ("epoch", *metrics))]
    for run, result in results.items():
        epoch = result.get("epoch")
        numbers = "".join(f"{100 * result[metric]:>9.2f}" for metric in metrics)
        lines.append(f"{run:<{width}}{'' if epoch is None else epoch:>9}{numbers}")
    columns = [[100 * result[metric] for result in results.values()] for metric in metrics]
    lines.append(
        f"{f'mean of {len(results)}':<{width}}{'':>9}" + "".join(f"{statistics.mean(c):>9.2f}" for c in columns)
    )
    if len(results) > 1:
        spreads = "".join(f"{statistics.stdev(column):>9.2f}" for column in columns)
        lines.append(f"{'standard deviation':<{width}}{'':>9}{spreads}")
    return "\n".join(lines)
