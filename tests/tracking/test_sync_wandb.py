"""slurm/sync_wandb.sh: what was recorded without a connection becomes one run, once."""

import os
import sys
from pathlib import Path

import pytest
from program import REPOSITORY
from wandb_server import WandbServer

SCRIPT = REPOSITORY / "slurm" / "sync_wandb.sh"


@pytest.fixture
def server():
    running = WandbServer()
    yield running
    running.stop()


def sync(place, *arguments, environment=None):
    programs = {"VENV_BIN": str(Path(sys.executable).parent)}
    return place.command(SCRIPT, *arguments, environment={**programs, **(environment or {})})


@pytest.mark.slow
def test_offline_parts_of_a_training_are_synced_once_as_one_run(place, server):
    for num_epochs in (1, 2):
        place.train("OUTPUT_DIR", "to_sync/a", "SOLVER.MAX_EPOCHS", num_epochs, "WANDB.ENABLE", "yes")
    folder = place.folder / "to_sync" / "a"
    run_id = (folder / "wandb_run_id").read_text().strip()
    parts = sorted(folder.glob("wandb/offline-run-*"))
    assert len(parts) == 2

    done = sync(place, "to_sync")
    assert (done.code, done.err) == (0, "")
    *left_out, last = done.out.splitlines()
    assert [line.partition("to_sync/a/wandb/")[2] for line in left_out] == [part.name for part in parts]
    assert "nothing" in last

    for part in parts:
        (file,) = part.glob("run-*.wandb")
        os.utime(file, (0, 0))
    environment = {**server.environment, "https_proxy": "", "WANDB_MODE": "online"}
    server.refuses_files = True
    done = sync(place, "to_sync", environment=environment)
    assert done.code == 1, done
    assert "did not accept all" in done.err
    server.refuses_files = False
    for last in ("Finished syncing", "nothing"):
        done = sync(place, "to_sync", environment=environment)
        assert done.code == 0, done
        assert last in done.out + done.err
        assert list(server.runs) == [run_id]
        rows = [row["iteration"] for row in server.runs[run_id].history if "train/loss" in row]
        assert sorted(set(rows)) == [1, 2, 3, 4]  # rows that are sent again are stored twice
    assert {artifact.state for artifact in server.artifacts} == {"COMMITTED"}


def test_segments_that_began_online_are_sent_too(place):
    for name in ("run-20260101_000000-abcdefgh", "run-20260102_000000-abcdefgh"):
        folder = place.folder / "to_show_online" / "wandb" / name
        folder.mkdir(parents=True)
        (folder / "run-abcdefgh.wandb").touch()
        os.utime(folder / "run-abcdefgh.wandb", (0, 0))
    (folder / "run-abcdefgh.wandb.synced").touch()
    done = sync(place, "--dry-run", "to_show_online")
    assert done.code == 0, done
    assert "Would sync 1 run(s)" in done.out + done.err
    assert "20260101_000000-abcdefgh" in done.out + done.err


def test_options_reach_wandb(place):
    folder = place.folder / "to_show" / "wandb" / "offline-run-20260101_000000-abcdefgh"
    folder.mkdir(parents=True)
    (folder / "run-abcdefgh.wandb").touch()
    os.utime(folder / "run-abcdefgh.wandb", (0, 0))
    done = sync(place, "--dry-run", "to_show")
    assert done.code == 0, done
    assert "run-abcdefgh.wandb" in done.out + done.err


def test_default_folder_is_runs(place):
    (place.folder / "runs").mkdir(exist_ok=True)
    (line,) = sync(place).out.splitlines()
    assert "nothing" in line
    assert line.endswith(" runs")
