"""What processes have left of a W&B run on the disk, and what of it W&B has."""

from __future__ import annotations

import glob
import logging
import os
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger("reid.tracking")

# In the log of W&B's own process: what it has given up sending. It tells its client nothing of that.
_GIVEN_UP = ('"ERROR+4"', "failed to log artifact", "CreateRunFiles returned error")


def unsent_pieces(folder: Path, run_id: str) -> list[Path]:
    """The folders of what processes have recorded of this run and W&B lacks, or may lack, the oldest first."""
    found = [
        piece
        for piece in (folder / "wandb").glob(f"*run-*-{glob.escape(run_id)}")
        if (piece / f"run-{run_id}.wandb").exists() and not _sent_marker(piece, run_id).exists()
    ]
    return sorted(found, key=lambda piece: piece.name.removeprefix("offline-"))


def send(pieces: list[Path], run_id: str, seconds: float) -> bool:
    """Whether W&B has taken all of them in the order of time: later it can put no row in before others.

    Args:
        pieces: folders.
        run_id: of the run.
        seconds: that it may take.
    """
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # one of its own
    command = [sys.executable, "-m", "wandb", "sync", *map(str, pieces)]
    try:
        subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return all(_sent_marker(piece, run_id).exists() for piece in pieces)


def _sent_marker(piece: Path, run_id: str) -> Path:
    """What `wandb sync` leaves behind and looks for."""
    return piece / f"run-{run_id}.wandb.synced"


def mark_sent(piece: Path, run_id: str) -> None:
    """As `wandb sync` would: wandb itself does not tell an online run that is complete from one that was killed."""
    try:
        _sent_marker(piece, run_id).touch()
    except OSError:
        logger.warning("warning: %s cannot be marked as sent", piece)


def gave_up(piece: Path) -> bool:
    """Whether W&B's own process has given up sending a part of an online run."""
    try:
        words = (piece / "logs" / "debug-internal.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(mark in words for mark in _GIVEN_UP)
