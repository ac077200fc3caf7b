"""Run segments on disk; test_wandb_online.py and test_sync_wandb.py check that W&B takes them.

Also covers reid.tracking.artifacts.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import psutil
import pytest
from program import TIMEOUT

from reid.runs.progress import SavedCheckpoint
from reid.tracking import artifacts
from reid.tracking.offline import mark_sent, remove_kept_checkpoints, send, sync_command, unsent_segments


@pytest.fixture
def segments(tmp_path) -> list[Path]:
    """Create segments of a run that started offline and continued online, among those of other runs."""
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


def test_unsent_segments_of_a_run_are_in_chronological_order(tmp_path, segments):
    assert unsent_segments(tmp_path, "abc") == segments[:3]
    mark_sent(segments[1])
    assert unsent_segments(tmp_path, "abc") == [segments[0], segments[2]]


def test_sync_command_includes_segments_that_began_online(segments):
    assert sync_command(segments[:1]) == ["wandb", "sync", str(segments[0])]
    assert sync_command(segments[:2]) == ["wandb", "sync", "--include-online", *map(str, segments[:2])]


def test_kept_file_is_removed_only_after_all_runs_are_sent(tmp_path, segments):
    file = tmp_path / "best_0001.pt"
    file.write_text("weights")
    kept = artifacts.keep_checkpoint(SavedCheckpoint("best", file, {}), "name", {}, segments[0])
    assert kept.samefile(file)
    file.unlink()
    for segment in segments[:3]:
        mark_sent(segment)
        remove_kept_checkpoints(tmp_path)
        assert kept.read_text() == "weights"
    mark_sent(segments[3])
    remove_kept_checkpoints(tmp_path)
    assert not kept.exists()


def test_checkpoint_of_killed_process_is_listed_with_metadata(tmp_path, segments):
    file = tmp_path / "best_0002.pt"
    file.write_text("weights")
    saved = SavedCheckpoint("best", file, {"epoch": 2, "iteration": 20, "mAP": 0.5})
    kept = artifacts.keep_checkpoint(saved, "name", {"world_size": 4}, segments[1])
    assert artifacts.unlogged_checkpoints(tmp_path, "abc") == [kept]
    assert artifacts.unlogged_checkpoints(tmp_path, "abcd") == []
    note = json.loads(kept.with_suffix(".json").read_text())
    metadata = {"epoch": 2, "iteration": 20, "mAP": 0.5, "world_size": 4, "kind": "best"}
    assert note == {"name": "name", "metadata": metadata}


def as_python(monkeypatch, folder: Path, script: str) -> None:
    """Replace Python with wandb, which `send` starts."""
    program = folder / "python"
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_segment_marked_synced_is_unsent_if_the_log_has_an_error(tmp_path, segments, monkeypatch):
    line = {"level": "ERROR", "msg": "sender: failed to log artifact: giving up", "sync_path": "$5/run-abc.wandb"}
    as_python(
        monkeypatch,
        tmp_path,
        'touch "$5/run-abc.wandb.synced" "$6/run-abc.wandb.synced"; mkdir -p "$WANDB_DIR/wandb/logs"\n'
        f'cat > "$WANDB_DIR/wandb/logs/debug-sync.1.log" <<END\n{json.dumps(line)}\nEND',
    )
    assert not send(segments[:2], 60)
    assert unsent_segments(tmp_path, "abc") == [segments[0], segments[2]]


def test_a_log_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path, segments, monkeypatch):
    as_python(
        monkeypatch,
        tmp_path,
        'touch "$5/run-abc.wandb.synced"; mkdir -p "$WANDB_DIR/wandb/logs"\n'
        """echo '{"msg": "failed to log artifact", "sync_pa' > "$WANDB_DIR/wandb/logs/debug-sync.1.log\"""",
    )
    assert not send(segments[:2], 60)
    assert unsent_segments(tmp_path, "abc") == segments[1:3]


@pytest.mark.slow
def test_hanging_wandb_sync_is_killed_with_its_service(tmp_path, segments, monkeypatch):
    shutil.copy(shutil.which("sleep"), tmp_path / "wandb-core")
    as_python(monkeypatch, tmp_path, f'{tmp_path}/wandb-core 1000 &\necho $! > "{tmp_path}/pid"\nwait')
    assert not send(segments[:1], 2)
    service = int((tmp_path / "pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(service).wait(TIMEOUT)
    assert not psutil.pid_exists(service)
