"""Weights & Biases and its failures: training always continues, and one line names the outcome.

Also covers reid.tracking.wandb_run.
"""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import wandb_files
from disturbances import at_step
from program import Ended, Place, Ranks, wait_for_file

from reid.config.schema import SETTINGS

KEY = "0123456789abcdef" * 3
NO_SERVER = {"WANDB_MODE": None, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def place(small_place: Place) -> Place:
    return small_place


def lines(ended: Ended) -> list[str]:
    return [line for line in ended.out.splitlines() if line.startswith("W&B")]


def recorded(place, output_dir: str, kind: str) -> list[dict]:
    return [record[kind] for record in place.wandb_records(place.folder / output_dir) if record["type"] == kind]


# ---- without a key ----


@pytest.fixture(scope="module")
def without_key(place) -> Ended:
    names = ["WANDB.NAME", "a name", "WANDB.TAGS", "[one,two]", "WANDB.GROUP", "a group", "WANDB.NOTES", "some notes"]
    settings = ["OUTPUT_DIR", "no key", "WANDB.ENABLE", "yes", "SOLVER.MAX_EPOCHS", 1, *names]
    return place.train(*settings, environment={"WANDB_MODE": None})


def test_run_without_key_is_recorded_offline_with_sync_command(place, without_key):
    started, ended = lines(without_key)
    assert all(fact in started for fact in ("run a name ", "offline", "WANDB_API_KEY")), started
    (folder,) = (place.folder / "no key" / "wandb").glob("offline-run-*")
    assert ended.endswith(f" wandb sync '{folder.relative_to(place.folder)}'")
    assert without_key.err == ""
    assert recorded(place, "no key", "exit")[0]["exit_code"] == 0


def test_the_run_has_the_names_that_were_given(place, without_key):
    (run,) = recorded(place, "no key", "run")
    given = {name: run[name] for name in ("display_name", "tags", "run_group", "notes", "job_type", "project")}
    assert given == {
        "display_name": "a name",
        "tags": ["one", "two"],
        "run_group": "a group",
        "notes": "some notes",
        "job_type": SETTINGS["WANDB.JOB_TYPE"].default,
        "project": SETTINGS["WANDB.PROJECT"].default,
    }


def test_the_checkpoint_knows_the_run_where_its_file_is_lost(place, without_key):
    file = place.folder / "no key" / "wandb_run_id"
    before = file.read_text()
    file.unlink()
    ended = place.train("OUTPUT_DIR", "no key", "WANDB.ENABLE", "yes", "SOLVER.MAX_EPOCHS", 2)
    assert lines(ended)[0].startswith("W&B: continuing run ")
    assert file.read_text() == before


# ---- with a key, and no server ----


@pytest.fixture(scope="module")
def without_server(place) -> Ended:
    settings = ("OUTPUT_DIR", "no server", "WANDB.ENABLE", "yes", "WANDB.INIT_TIMEOUT", 1, "SOLVER.MAX_EPOCHS", 1)
    return place.train(*settings, environment=NO_SERVER)


def test_run_without_server_is_recorded_offline(place, without_server):
    started, _ = lines(without_server)
    assert started.startswith("W&B: run ")
    assert "offline" in started
    assert "CommError: " in started
    assert without_server.err == ""
    rows = [row["item"] for row in recorded(place, "no server", "history")]
    assert len([row for row in rows if "train/loss" in row or "val/mAP" in row]) == 3


def test_the_key_is_written_nowhere(place, without_server):
    files = [file for folder in ("no server", "home", "wandb") for file in (place.folder / folder).rglob("*")]
    assert not [file for file in files if file.is_file() and KEY.encode() in file.read_bytes()]


@pytest.mark.slow
def test_invalid_key_is_named_and_training_continues_offline(place):
    settings = ("OUTPUT_DIR", "bad key", "WANDB.ENABLE", "yes", "SOLVER.MAX_EPOCHS", 1)
    ended = place.train(*settings, environment={"WANDB_MODE": None, "WANDB_API_KEY": "short"})
    assert "offline" in lines(ended)[0]
    assert "WANDB_API_KEY invalid: " in lines(ended)[0]
    assert ended.err == ""


# ---- not wanted ----


@pytest.mark.parametrize(
    ("settings", "environment", "reasons"),
    [
        (["WANDB.ENABLE", "no"], {}, []),
        (["WANDB.ENABLE", "yes", "WANDB.MODE", "disabled"], {}, ["WANDB.MODE is disabled"]),
        (
            ["WANDB.ENABLE", "yes"],
            {"WANDB_MODE": "disabled"},
            ["WANDB_MODE is disabled"],
        ),
    ],
)
def test_disabled_tracking_records_nothing(place, tmp_path, settings, environment, reasons):
    ended = place.train("OUTPUT_DIR", tmp_path / "run", "SOLVER.MAX_EPOCHS", 1, *settings, environment=environment)
    assert len(lines(ended)) == len(reasons)
    assert all(reason in line for reason, line in zip(reasons, lines(ended), strict=True))
    assert not (tmp_path / "run" / "wandb").exists()


def test_settings_rejected_by_wandb_are_reported_before_training(place):
    settings = ("OUTPUT_DIR", "refused", "WANDB.ENABLE", "yes")
    message = place.refusal("train", *settings, environment={"WANDB_MODE": "ofline"}, num_ranks=2, code=2)
    assert "'ofline'" in message
    assert "WANDB.ENABLE no" in message


# ---- lost on the way ----


def wandb_process_of(ranks: Ranks) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, parent = (
                (folder / "cmdline").read_text(),
                (folder / "stat").read_text().rpartition(")")[2].split()[1],
            )
        except OSError:
            continue  # it has ended
        if "wandb-core" in command and int(parent) == ranks.pid():
            return int(folder.name)
    raise AssertionError("no process of W&B")


def test_training_outlives_wandb_core(place):
    is_killed = place.folder / "W&B is dead"
    settings = ("OUTPUT_DIR", "lost", "WANDB.ENABLE", "yes", "SOLVER.MAX_EPOCHS", 3)
    ranks = place.start("train", *settings, before=partial(at_step, 2, partial(wait_for_file, is_killed)))
    ranks.wait_for("epoch 1/3 step 1/2")
    os.kill(wandb_process_of(ranks), signal.SIGKILL)
    is_killed.touch()
    (ended,) = ranks.ended()
    assert ended.code == 0, ended
    (warning,) = (line for line in ended.out.splitlines() if "died" in line)
    assert warning.startswith("warning: W&B: ")
    assert "Connection" in warning
    assert "offline" in warning
    segments = sorted((place.folder / "lost" / "wandb").glob("offline-run-*"), key=lambda segment: segment.name)
    assert lines(ended)[-1].endswith(" ".join(str(segment.relative_to(place.folder)) for segment in segments))
    iterations = [row["iteration"] for segment in segments for row in wandb_files.rows(segment) if "train/loss" in row]
    assert iterations[-5:] == [2, 3, 4, 5, 6]  # the first one may have died with it
    assert "epoch 3: mAP" in ended.out


@pytest.mark.slow
def test_missing_home_variable_gives_no_warning(place):
    settings = ("OUTPUT_DIR", "homeless", "WANDB.ENABLE", "yes", "SOLVER.MAX_EPOCHS", 1)
    nowhere = {"HOME": None, "WANDB_CACHE_DIR": None, "WANDB_DATA_DIR": None, "WANDB_CONFIG_DIR": None}
    ended = place.train(*settings, environment=nowhere)
    assert ended.err == ""
    assert ended.out.count("W&B: ") == 2
