"""Tables, clocks and the description of the machine for the benchmark scripts."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date

from reid.process.text_tables import format_table

MIB = 2**20


def print_line(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a Markdown table with numbers rounded to three significant digits."""
    cells = [header, ["---"] * len(header), *([format_value(value) for value in row] for row in rows)]
    bordered = [["", *row, ""] for row in cells]
    lines = format_table(bordered, "<" * (len(header) + 2), separator=" | ").splitlines()
    print_line(f"\n{title}\n\n" + "\n".join(line.strip() for line in lines))


def format_value(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> str:
    """Return date, machine and versions, which belong next to every figure."""
    import torch  # imported here because run.py needs no torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{date.today()}, {os.cpu_count()} CPU cores, {gpu}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, load average {load}"
    )


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    return statistics.median(seconds_of(work) for _ in range(repeats))
