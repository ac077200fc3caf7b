"""Runs the benchmarks and writes their tables into RESULTS.md.

    uv run python benchmarks/run.py [--quick] [--output FILE] [PART ...]

Every part is a script beside this one, in a process of its own, one after the other. What it prints goes between the
part's two marks in the file, under the command and the commit; all else in the file, the words about it, stays as it
is, so that a part may be run again alone. With `--quick` nothing is written unless `--output` says where.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from tables import say

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
    """The short name of what runs, with a star where files were changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("*" if git("status", "--porcelain", "--untracked-files=no") else "")


def marks(part: str) -> tuple[str, str]:
    return f"<!-- begin {part} -->", f"<!-- end {part} -->"


def with_section(text: str, part: str, content: str) -> str:
    """The text with the content between the part's marks, which are added at the end where they are missing."""
    begin, end = marks(part)
    if begin not in text:
        text = f"{text.rstrip()}\n\n## {PARTS[part]}\n\n{begin}\n{end}\n".lstrip()
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def run(part: str, *, quick: bool) -> str | None:
    """What the script has printed, under its command; None where it failed."""
    words = [f"benchmarks/{part}.py", *(["--quick"] if quick else [])]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(HERE / f"{part}.py"), *words[1:]],
        stdout=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode:
        say(f"{words[0]} ended with {done.returncode}; its part stays as it was")
        return None
    minutes = (time.monotonic() - begun) / 60
    return f"`uv run python {' '.join(words)}`, commit {commit()}, {minutes:.1f} minutes\n\n{done.stdout.strip()}"


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
        say(f"\n## {PARTS[part]}\n\n{content}")
        if output is not None:
            output.write_text(with_section(output.read_text() if output.exists() else "", part, content))
    if failed:
        say(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
