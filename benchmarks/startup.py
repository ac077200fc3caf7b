"""Time from the command to the first training step: seconds and CPU seconds, by cause.

    uv run python benchmarks/startup.py [--quick]

Answers without torch (`--help`, an invalid setting) against the interpreter alone; imports of each package; and the
program itself on the generated benchmark, whose images are decoded already, from log line to log line. Everything runs
in a separate process.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tables import machine, print_line, table

HERE = Path(__file__).parent
TRAIN = [sys.executable, "-u", str(HERE.parent / "launch" / "train.py")]
SETTINGS = ["--config_file", str(HERE / "continuity.yml"), "OUTPUT_DIR", "run", "SOLVER.MAX_EPOCHS", "1"]
LIMIT = 0.5  # seconds for an answer without torch
NUM_PACKAGES = 10
# Stage -> the log line that ends it.
STAGES = (
    ("interpreter, settings, imports, process group", r"^synthetic +ids"),
    ("data, model, optimizer (torch's compiler is imported)", r"^training resnet18"),
    ("the first step", r"^epoch \d+/\d+ step"),
)


class Used(NamedTuple):
    cpu: float  # seconds
    seconds: float


def run(command: list[str], folder: Path) -> Used:
    before, start = children_cpu(), time.perf_counter()
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return Used(children_cpu() - before, time.perf_counter() - start)


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median(command: list[str], folder: Path, repeats: int) -> Used:
    used = [run(command, folder) for _ in range(repeats)]
    return Used(statistics.median(u.cpu for u in used), statistics.median(u.seconds for u in used))


def answers(folder: Path, repeats: int) -> None:
    commands = {
        "interpreter alone (limit)": [sys.executable, "-c", "pass"],
        "--help": [*TRAIN, "--help"],
        "an invalid setting": [*TRAIN, "SOLVER.BASE_LR", "fast"],
        "an unknown key": [*TRAIN, *SETTINGS, "SOLVER.BASELR", "1"],
    }
    rows = []
    for name, command in commands.items():
        used = median(command, folder, repeats)
        rows.append([name, used.cpu, used.seconds, LIMIT if "limit" not in name else ""])
    table(f"Answers without torch, median of {repeats}", ["what", "CPU s", "s", "may take s"], rows)


def imports(folder: Path, repeats: int) -> None:
    """Print the seconds of complete imports, and those of the modules by package."""
    codes = [
        "pass",
        "import torch",
        "import reid.evaluation.evaluator",
        "import reid.training.train",
        "import torch._dynamo",
        "import torchvision",
    ]
    rows: list[list[object]] = []
    for code in codes:
        used = median([sys.executable, "-c", code], folder, repeats)
        rows.append([code, used.cpu, used.seconds])
    table(
        f"Imports, median of {repeats}; most of torchvision's cost is torch's compiler, which the first optimizer "
        "of a process would import too",
        ["code", "CPU s", "s"],
        rows,
    )
    command = [sys.executable, "-X", "importtime", "-c", "import reid.training.train"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    seconds = Counter[str]()
    for micros, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, flags=re.MULTILINE):
        seconds[module.split(".")[0]] += int(micros)
    total = sum(seconds.values())
    rows = [[name, micros / 1e6, f"{100 * micros / total:.0f} %"] for name, micros in seconds.most_common(NUM_PACKAGES)]
    table(
        "Of `import reid.training.train` (-X importtime, which slows it down), seconds in modules of",
        ["package", "s", "share"],
        rows,
    )


def to_the_first_step(folder: Path) -> None:
    run([*TRAIN, *SETTINGS], folder)  # generates and decodes the images
    before, start = children_cpu(), time.perf_counter()
    command = [*TRAIN, *SETTINGS[:2], "OUTPUT_DIR", "again", "SOLVER.MAX_EPOCHS", "1"]
    ends: list[float] = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if len(ends) < len(STAGES) and re.search(STAGES[len(ends)][1], line):
                ends.append(time.perf_counter() - start)
    cpu = children_cpu() - before
    if len(ends) < len(STAGES):
        raise RuntimeError(f"the training ended before it printed {STAGES[len(ends)][1]}")
    rows: list[list[object]] = []
    for (name, _), start, end in zip(STAGES, [0.0, *ends], ends, strict=False):
        rows.append([name, end - start, f"{100 * (end - start) / ends[-1]:.0f} %"])
    rows.append(["from the command to the first step", ends[-1], "100 %"])
    table(f"One rank, images decoded before; {cpu:.3g} CPU s to its end", ["cause", "s", "share"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="answers without torch only, seconds")
    arguments = parser.parse_args()
    print_line(f"startup.py{' --quick' if arguments.quick else ''}: {machine()}")
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        answers(Path(folder), 3)
        if not arguments.quick:
            imports(Path(folder), 1)
            to_the_first_step(Path(folder))


if __name__ == "__main__":
    main()
