"""What lies on the disk of a W&B run; that W&B takes it is in test_wandb_online.py and test_sync_wandb.py.

Also covers reid.handlers.artifacts.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import psutil
import pytest
from program import TIMEOUT

from reid.handlers import artifacts
from reid.handlers.records import SavedCheckpoint
from reid.handlers.wandb_pieces import forget_kept, keep, mark_sent, send, sync_words, unsent_pieces


@pytest.fixture
def pieces(tmp_path) -> list[Path]:
    """Of a run that began offline and went on online, between those of others."""
    made = []
    for name in (
        "offline-run-20260101_1-abc",
        "run-20260102_1-abc",
        "offline-run-20260103_1-abc",
        "run-20260101_1-abcd",
    ):
        folder = tmp_path / "wandb" / name
        folder.mkdir(parents=True)
        (folder / f"run-{name.rpartition('-')[2]}.wandb").touch()
        made.append(folder)
    (tmp_path / "wandb" / "latest-run").symlink_to(made[1])
    return made


def test_unsent_pieces_of_a_run_are_in_chronological_order(tmp_path, pieces):
    assert unsent_pieces(tmp_path, "abc") == pieces[:3]
    mark_sent(pieces[1])
    assert unsent_pieces(tmp_path, "abc") == [pieces[0], pieces[2]]


def test_wandb_is_asked_for_those_that_began_online_too(pieces):
    assert sync_words(pieces[:1]) == ["wandb", "sync", str(pieces[0])]
    assert sync_words(pieces[:2]) == ["wandb", "sync", "--include-online", *map(str, pieces[:2])]


def test_kept_file_is_removed_only_after_all_runs_are_sent(tmp_path, pieces):
    file = tmp_path / "best_0001.pt"
    file.write_text("weights")
    kept = keep(file, pieces[0])
    assert kept.samefile(file)
    file.unlink()
    for piece in pieces[:3]:
        mark_sent(piece)
        forget_kept(tmp_path)
        assert kept.read_text() == "weights"
    mark_sent(pieces[3])
    forget_kept(tmp_path)
    assert not kept.exists()


def test_checkpoint_of_killed_process_is_found_with_metadata(tmp_path, pieces):
    file = tmp_path / "best_0002.pt"
    file.write_text("weights")
    saved = SavedCheckpoint("best", file, {"epoch": 2, "iteration": 20, "mAP": 0.5})
    kept = artifacts.keep_checkpoint(saved, "name", {"world_size": 4}, pieces[1])
    assert artifacts.unlogged_checkpoints(tmp_path, "abc") == [kept]
    assert artifacts.unlogged_checkpoints(tmp_path, "abcd") == []
    note = json.loads(kept.with_suffix(".json").read_text())
    metadata = {"epoch": 2, "iteration": 20, "mAP": 0.5, "world_size": 4, "kind": "best"}
    assert note == {"name": "name", "metadata": metadata}


def as_python(monkeypatch, folder: Path, script: str) -> None:
    """What `send` starts, in the place of Python with wandb."""
    program = folder / "python"
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_piece_marked_synced_is_unsent_if_the_log_has_an_error(tmp_path, pieces, monkeypatch):
    line = {"level": "ERROR", "msg": "sender: failed to log artifact: giving up", "sync_path": "$5/run-abc.wandb"}
    as_python(
        monkeypatch,
        tmp_path,
        'touch "$5/run-abc.wandb.synced" "$6/run-abc.wandb.synced"; mkdir -p "$WANDB_DIR/wandb/logs"\n'
        f'cat > "$WANDB_DIR/wandb/logs/debug-sync.1.log" <<END\n{json.dumps(line)}\nEND',
    )
    assert not send(pieces[:2], 60)
    assert unsent_pieces(tmp_path, "abc") == [pieces[0], pieces[2]]


def test_a_log_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path, pieces, monkeypatch):
    as_python(
        monkeypatch,
        tmp_path,
        'touch "$5/run-abc.wandb.synced"; mkdir -p "$WANDB_DIR/wandb/logs"\n'
        """echo '{"msg": "failed to log artifact", "sync_pa' > "$WANDB_DIR/wandb/logs/debug-sync.1.log\"""",
    )
    assert not send(pieces[:2], 60)
    assert unsent_pieces(tmp_path, "abc") == pieces[1:3]


@pytest.mark.slow
def test_hanging_wandb_sync_is_killed_with_its_service(tmp_path, pieces, monkeypatch):
    shutil.copy(shutil.which("sleep"), tmp_path / "wandb-core")
    as_python(monkeypatch, tmp_path, f'{tmp_path}/wandb-core 1000 &\necho $! > "{tmp_path}/pid"\nwait')
    assert not send(pieces[:1], 2)
    service = int((tmp_path / "pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(service).wait(TIMEOUT)
    assert not psutil.pid_exists(service)
