"""Where the time from the command to the first training step goes: seconds and CPU seconds, by cause.

    uv run python benchmarks/startup.py [--quick]

What answers without torch (`--help`, a wrong setting) against the interpreter alone; what each package costs to import;
and the program itself on the generated benchmark, whose images are decoded already, from line to line of what it says.
Everything is a process of its own.
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

from tables import machine, say, table

HERE = Path(__file__).parent
TRAIN = [sys.executable, "-u", str(HERE.parent / "launch" / "train.py")]
SETTINGS = ["--config_file", str(HERE / "continuity.yml"), "OUTPUT_DIR", "run", "SOLVER.MAX_EPOCHS", "1"]
LIMIT = 0.5  # seconds for an answer without torch
NUM_PACKAGES = 10
# What happens -> the line that ends it.
STAGES = (
    ("interpreter, settings, imports, process group", r"^synthetic +ids"),
    ("data, model, optimiser (torch's compiler is imported)", r"^training resnet18"),
    ("the first step", r"^epoch \d+/\d+ step"),
)


class Used(NamedTuple):
    cpu: float  # seconds
    seconds: float


def run(words: list[str], folder: Path) -> Used:
    before, begun = children_cpu(), time.perf_counter()
    subprocess.run(words, cwd=folder, capture_output=True, check=False)
    return Used(children_cpu() - before, time.perf_counter() - begun)


def children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def median(words: list[str], folder: Path, repeats: int) -> Used:
    used = [run(words, folder) for _ in range(repeats)]
    return Used(statistics.median(u.cpu for u in used), statistics.median(u.seconds for u in used))


def answers(folder: Path, repeats: int) -> None:
    commands = {
        "interpreter alone (limit)": [sys.executable, "-c", "pass"],
        "--help": [*TRAIN, "--help"],
        "a wrong setting": [*TRAIN, "SOLVER.BASE_LR", "fast"],
        "a key that there is not, in a file": [*TRAIN, *SETTINGS, "SOLVER.BASELR", "1"],
    }
    rows = []
    for name, words in commands.items():
        used = median(words, folder, repeats)
        rows.append([name, used.cpu, used.seconds, LIMIT if "limit" not in name else ""])
    table(f"Answers without torch, median of {repeats}", ["what", "CPU s", "s", "may take s"], rows)


def imports(folder: Path, repeats: int) -> None:
    """Whole imports, and the modules' own seconds by package."""
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
        f"Imports, median of {repeats}; most of torchvision's cost is torch's own compiler, which the first optimiser "
        "of a process would import too",
        ["code", "CPU s", "s"],
        rows,
    )
    words = [sys.executable, "-X", "importtime", "-c", "import reid.training.train"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    own = Counter[str]()
    for micros, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, flags=re.MULTILINE):
        own[module.split(".")[0]] += int(micros)
    total = sum(own.values())
    rows = [[name, micros / 1e6, f"{100 * micros / total:.0f} %"] for name, micros in own.most_common(NUM_PACKAGES)]
    table(
        "Of `import reid.training.train` (-X importtime, which slows it down), seconds in modules of",
        ["package", "s", "share"],
        rows,
    )


def to_the_first_step(folder: Path) -> None:
    run([*TRAIN, *SETTINGS], folder)  # generates and decodes the images
    before, begun = children_cpu(), time.perf_counter()
    words = [*TRAIN, *SETTINGS[:2], "OUTPUT_DIR", "again", "SOLVER.MAX_EPOCHS", "1"]
    ends: list[float] = []
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if len(ends) < len(STAGES) and re.search(STAGES[len(ends)][1], line):
                ends.append(time.perf_counter() - begun)
    cpu = children_cpu() - before
    if len(ends) < len(STAGES):
        raise RuntimeError(f"the training ended before it said {STAGES[len(ends)][1]}")
    rows: list[list[object]] = []
    for (name, _), start, end in zip(STAGES, [0.0, *ends], ends, strict=False):
        rows.append([name, end - start, f"{100 * (end - start) / ends[-1]:.0f} %"])
    rows.append(["from the command to the first step", ends[-1], "100 %"])
    table(f"One rank, images decoded before; {cpu:.3g} CPU s to its end", ["cause", "s", "share"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="answers without torch only, seconds")
    arguments = parser.parse_args()
    say(f"startup.py{' --quick' if arguments.quick else ''}: {machine()}")
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        answers(Path(folder), 3)
        if not arguments.quick:
            imports(Path(folder), 1)
            to_the_first_step(Path(folder))


if __name__ == "__main__":
    main()
