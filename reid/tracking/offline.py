"""Run segments on disk: the part of a W&B run that each process has recorded, and the parts that the server lacks."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from reid.process.side_effects import optional
from reid.tracking.service import kill_services

KEPT = "checkpoints"  # folder in a segment: checkpoint files that W&B has not taken yet

# wandb-core reports only in its log that it has given up: an online run that was rejected ends without an error (row
# "HTTP 401 in the middle" of the outage table), and `wandb sync` marks a segment as sent and ends with 0 although the
# server has not taken a checkpoint (test_sync_wandb.py; slurm/sync_wandb.sh looks for the same).
_GAVE_UP = re.compile(r'"ERROR\+4"|failed to log artifact|CreateRunFiles returned error')


def unsent_segments(folder: Path, run_id: str) -> list[Path]:
    """Return the segments of a run ("*": of all runs) that W&B lacks or may lack, the oldest first."""
    pattern = f"*run-*/run-{run_id if run_id == '*' else glob.escape(run_id)}.wandb"
    segments = [file.parent for file in (folder / "wandb").glob(pattern) if not _sent_marker(file.parent).exists()]
    return sorted(segments, key=lambda segment: segment.name.removeprefix("offline-"))


def sync_command(segments: Sequence[Path]) -> list[str]:
    """Return the command that sends the segments; wandb sorts them by time."""
    is_any_online = any(not segment.name.startswith("offline-") for segment in segments)  # skipped by default
    return ["wandb", "sync", *(["--include-online"] if is_any_online else []), *map(str, segments)]


def send(segments: Sequence[Path], seconds: float) -> bool:
    """Return whether W&B has taken all segments within `seconds`; rows can only be added in the order of time."""
    command = [sys.executable, "-m", *sync_command([segment.absolute() for segment in segments])]
    null = subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as logs:
        environment = os.environ | {"WANDB_DIR": logs}
        environment.pop("WANDB_SERVICE", None)  # it starts another wandb-core
        with subprocess.Popen(command, env=environment, stdin=null, stdout=null, stderr=null) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                kill_services(process.pid)
                process.kill()
        for line in _lines_of_giving_up(Path(logs).glob("wandb/logs/debug-sync.*.log")):
            if rejected := re.search(r'"sync_path": ?"([^"]+)"', line):
                Path(f"{rejected[1]}.synced").unlink(missing_ok=True)
    return all(_sent_marker(segment).exists() for segment in segments)


def was_rejected(segment: Path) -> bool:
    """Return whether the server has not taken a part of an online segment, although its run has finished."""
    return bool(_lines_of_giving_up(segment.glob("logs/debug-internal.log")))


def _lines_of_giving_up(logs: Iterable[Path]) -> list[str]:
    lines = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [line for line in lines if _GAVE_UP.search(line)]


def _sent_marker(segment: Path) -> Path:
    """Return the file that `wandb sync` creates and looks for."""
    (file,) = segment.glob("run-*.wandb")
    return file.with_suffix(".wandb.synced")


def mark_sent(segment: Path) -> None:
    """Create the marker of `wandb sync`: wandb cannot distinguish a complete online run from a killed one."""
    with optional(f"W&B: {segment} cannot be marked as sent"):
        _sent_marker(segment).touch()


def remove_kept_checkpoints(folder: Path) -> None:
    """Remove the checkpoint files kept for W&B once all segments are sent: one may need a file of another."""
    if not unsent_segments(folder, "*"):
        for kept in (folder / "wandb").glob(f"*run-*/{KEPT}"):
            shutil.rmtree(kept, ignore_errors=True)
