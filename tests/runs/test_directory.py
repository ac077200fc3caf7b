"""Files of a run, written by one training at a time."""

import csv
import json
import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from program import Place

import reid
from reid.config.load import load_config
from reid.runs import directory
from reid.runs.directory import RunDirectory


@pytest.fixture
def folder(tmp_path):
    """Yield a run directory, whose log is closed at the end."""
    logger = logging.getLogger("reid")
    before = logger.handlers[:]
    yield RunDirectory(tmp_path / "a" / "run")
    for handler in set(logger.handlers) - set(before):
        logger.removeHandler(handler)
        handler.close()


def test_the_folder_is_made_with_its_parents(folder):
    assert folder.checkpoints.is_dir()
    assert (folder.path / "log.txt").is_file()


def test_what_is_logged_is_appended_to_the_log_with_its_time(folder):
    logging.getLogger("reid.somewhere").error("häppened")
    assert folder.path.joinpath("log.txt").read_text(encoding="utf-8").endswith(" häppened\n")
    assert folder.path.joinpath("log.txt").read_text()[:2] == "20"


def test_records_after_the_checkpoint_and_torn_lines_are_dropped(folder):
    for iteration in range(1, 6):
        folder.append_metrics({"kind": "train", "iteration": iteration})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "itera')
    folder.resume_from(3, 0)
    folder.append_metrics({"kind": "train", "iteration": 4})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]


def test_a_run_without_records_has_none_to_drop(folder):
    folder.resume_from(0, 0)
    assert not (folder.path / "metrics.jsonl").exists()


def test_the_settings_are_written_as_they_can_be_loaded(folder):
    cfg = load_config(
        None, ["SOLVER.BASE_LR=1e-3", "SOLVER.MARGIN=None", f"OUTPUT_DIR={folder.path}", "WANDB.NAME=ä: b"]
    )
    folder.describe(cfg, torch.device("cpu"))
    assert load_config(str(folder.path / "config.yaml"), []) == cfg


def test_source_fingerprint_covers_every_file_of_the_package(tmp_path, monkeypatch):
    assert Path(reid.__file__).parent == directory._SOURCE
    monkeypatch.setattr(directory, "_SOURCE", tmp_path)
    (tmp_path / "training").mkdir()
    file = tmp_path / "training" / "step.py"
    file.write_text("a")
    before = directory.source_fingerprint()
    file.write_text("b")
    assert directory.source_fingerprint() != before


class Row(NamedTuple):
    path: str
    pid: int
    AP: float | None


def test_rows_are_read_back_from_their_file(folder):
    rows = [Row('a, "b".jpg', 2**60, 1 / 3), Row("two\nlines, ü", -1, None)]
    folder.write_rows("rows.csv", rows)
    folder.write_rows("rows.csv", rows)  # replaces the other
    with (folder.path / "rows.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["path", "pid", "AP"],
            ['a, "b".jpg', str(2**60), repr(1 / 3)],
            ["two\nlines, ü", "-1", ""],
        ]


def test_a_training_clears_away_what_a_killed_one_was_writing(folder):
    unfinished = [folder.path / ".result.json.123.tmp", folder.checkpoints / ".last_0001_00000002.pt.123.tmp"]
    for file in unfinished:
        file.touch()
    folder.tidy()
    assert not any(file.exists() for file in unfinished)
    assert (folder.path / "log.txt").exists()


def test_a_second_training_in_the_same_folder_is_rejected(place: Place):
    ranks = place.start("train", "OUTPUT_DIR", "busy", "SOLVER.MAX_EPOCHS", 1000)
    ranks.wait_for("epoch 1/1000 step 1/2")
    message = place.refusal("train", "OUTPUT_DIR", "busy", num_ranks=2, code=1)
    assert "OUTPUT_DIR must be free, got busy" in message
    assert "in use" in message
    ranks.kill()
    place.train("OUTPUT_DIR", "busy", "SOLVER.MAX_EPOCHS", 1)
