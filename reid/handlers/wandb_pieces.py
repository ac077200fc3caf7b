"""What processes have left of a W&B run on the disk, and what of it W&B has."""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from reid.handlers.wandb_process import kill, services_of

logger = logging.getLogger("reid.tracking")

_KEPT = "checkpoints"  # in a piece: the files that W&B has still to take

# In the log of W&B's own process: what it has given up sending. It tells its client nothing of that.
_GIVEN_UP = ('"ERROR+4"', "failed to log artifact", "CreateRunFiles returned error")


def unsent_pieces(folder: Path, run_id: str) -> list[Path]:
    """The folders of what processes have recorded of this run and W&B lacks, or may lack, the oldest first."""
    return _unsent(folder, glob.escape(run_id))


def _unsent(folder: Path, run_ids: str) -> list[Path]:
    found = [
        file.parent
        for file in (folder / "wandb").glob(f"*run-*/run-{run_ids}.wandb")
        if not _sent_marker(file.parent).exists()
    ]
    return sorted(found, key=lambda piece: piece.name.removeprefix("offline-"))


def sync_words(pieces: Sequence[Path]) -> list[str]:
    """The command that sends them; it brings them into the order of time itself."""
    began_online = any(not piece.name.startswith("offline-") for piece in pieces)  # left out unless asked for
    return ["wandb", "sync", *(["--include-online"] if began_online else []), *map(str, pieces)]


def send(pieces: Sequence[Path], seconds: float) -> bool:
    """Whether W&B has taken all of them in the order of time: later it can put no row in before others.

    Args:
        pieces: folders.
        seconds: that it may take.
    """
    folder = pieces[0].absolute().parent
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # one of its own
    environment["WANDB_DIR"] = str(folder.parent)  # for its log
    command = [sys.executable, "-m", *sync_words([piece.absolute() for piece in pieces])]
    nothing, logs_before = subprocess.DEVNULL, set(_sync_logs(folder))
    with subprocess.Popen(command, env=environment, stdin=nothing, stdout=nothing, stderr=nothing) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            services = services_of(process.pid)
            process.kill()
            kill(services)
    for log in set(_sync_logs(folder)) - logs_before:
        _unmark_refused(log)
    return all(_sent_marker(piece).exists() for piece in pieces)


def _sync_logs(folder: Path) -> list[Path]:
    return list((folder / "logs").glob("debug-sync.*.log"))


def _unmark_refused(log: Path) -> set[Path]:
    """The pieces that W&B has not taken whole, by the log of a `wandb sync`, and no longer marked as sent.

    It ends with 0 and marks a piece as sent even if W&B has not taken its artifacts.
    """
    refused = set()
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if any(mark in line for mark in _GIVEN_UP):
            with suppress(ValueError, KeyError):  # cut off, with a process that was killed before it marked the piece
                piece = Path(json.loads(line)["sync_path"]).parent
                _sent_marker(piece).unlink(missing_ok=True)
                refused.add(piece)
    return refused


def _sent_marker(piece: Path) -> Path:
    """What `wandb sync` leaves behind and looks for."""
    (file,) = piece.glob("run-*.wandb")
    return file.with_suffix(".wandb.synced")


def mark_sent(piece: Path) -> None:
    """As `wandb sync` would: wandb itself does not tell an online run that is complete from one that was killed."""
    try:
        _sent_marker(piece).touch()
    except OSError:
        logger.warning("warning: %s cannot be marked as sent", piece)


def gave_up(piece: Path) -> bool:
    """Whether W&B's own process has given up sending a part of an online run."""
    try:
        words = (piece / "logs" / "debug-internal.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(mark in words for mark in _GIVEN_UP)


def keep(file: Path, piece: Path) -> Path:
    """The file under another name, which rotation does not take away and which costs no space.

    W&B reads it when it sends it, which may be long after the checkpoint has made room for newer ones.
    """
    folder = (piece / _KEPT).absolute()
    folder.mkdir(exist_ok=True)
    kept = folder / file.name
    kept.unlink(missing_ok=True)
    try:
        os.link(file, kept)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, kept)
    return kept


def forget_kept(folder: Path) -> None:
    """Removes what was kept for W&B, once it has all that any run in this folder has recorded."""
    if not _unsent(folder, "*"):  # one piece may need what another one has kept
        for kept in (folder / "wandb").glob(f"*run-*/{_KEPT}"):
            shutil.rmtree(kept, ignore_errors=True)


def main(logs: Sequence[str]) -> int:
    """For slurm/sync_wandb.sh: says which pieces were not taken whole; the exit code is 1 where there are any."""
    refused = sorted({piece for log in logs for piece in _unmark_refused(Path(log))})
    for piece in refused:
        sys.stderr.write(f"not all of it was taken by W&B: {piece}\n")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
