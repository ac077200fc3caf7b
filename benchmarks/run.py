"""Command that runs the benchmarks and writes their tables into RESULTS.md.

    uv run python benchmarks/run.py [--quick] [--output FILE] [PART ...]

Every part is a script in this folder; they run one after the other, each in a separate process. The output goes between
the two marks of the part in the file, with the command and the commit. The rest of the file stays as it is, so a part
may be run again alone. With `--quick`, nothing is written without `--output`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tables import print_line

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
PARTS = {
    "input": "Input",
    "evaluation": "Evaluation",
    "reranking": "Re-ranking",
    "step": "Training step",
    "sampler": "Sampler",
    "startup": "Start-up",
    "communication": "Communication",
    "continuity": "Continuity",
    "scaling": "Scaling",
}
PATIENCE = 3600  # seconds for one part


def commit() -> str:
    """Return the short hash of the commit, with a star if files have changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("*" if git("status", "--porcelain", "--untracked-files=no") else "")


def marks(part: str) -> tuple[str, str]:
    return f"<!-- begin {part} -->", f"<!-- end {part} -->"


def with_section(text: str, part: str, content: str) -> str:
    """Return the text with the content between the marks of the part, which are added at the end if missing."""
    begin, end = marks(part)
    if begin not in text:
        text = f"{text.rstrip()}\n\n## {PARTS[part]}\n\n{begin}\n{end}\n".lstrip()
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def run(part: str, *, quick: bool) -> str | None:
    """Run the script; return its output with its command, or None if it failed."""
    command = [f"benchmarks/{part}.py", *(["--quick"] if quick else [])]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(HERE / f"{part}.py"), *command[1:]],
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode:
        print_line(f"{command[0]} ended with {done.returncode}; its part stays as it was")
        return None
    minutes = (time.monotonic() - start) / 60
    return f"`uv run python {' '.join(command)}`, commit {commit()}, {minutes:.1f} minutes\n\n{done.stdout.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all of them")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few minutes in all")
    parser.add_argument("--output", type=Path, help=f"the file; default: {RESULTS.name}, with --quick none")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(unknown)}")
    output = arguments.output or (None if arguments.quick else RESULTS)
    failed = []
    for part in arguments.parts or PARTS:
        content = run(part, quick=arguments.quick)
        if content is None:
            failed.append(part)
            continue
        print_line(f"\n## {PARTS[part]}\n\n{content}")
        if output is not None:
            output.write_text(with_section(output.read_text() if output.exists() else "", part, content))
    if failed:
        print_line(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
