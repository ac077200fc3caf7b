"""Only one training writes into a run directory: the latest start of its job."""

import json
import logging

import pytest
from ignite.engine import Engine
from refusals import refused

from reid.distributed.launch_environment import Start
from reid.errors import TakenOverError, WorldError
from reid.runs.ownership import Ownership
from reid.runs.progress import Records


class Folder:
    """A run directory whose lock is free or held by another training, as the test sets it."""

    def __init__(self, path):
        self.path, self.is_free, self.num_tidied, self.num_locked = path, True, 0, 0

    def lock(self):
        self.num_locked += self.is_free
        return self.is_free

    def tidy(self):
        self.num_tidied += 1


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_a_free_folder_is_claimed_by_anybody(folder):
    for start in (Start(), Start("7", 0, "7-0"), Start("8", 0, "8-0"), Start()):
        Ownership(folder, start).check()
    assert folder.num_tidied == 4


@pytest.mark.parametrize("start", [Start(), Start("8", 5, "8-5"), Start("7", 0, "another")])
def test_a_locked_folder_is_rejected(folder, start):
    first = Ownership(folder, Start("7", 0, "7-0"))
    folder.is_free = False
    with refused(WorldError, "OUTPUT_DIR", str(folder.path), "in use"):
        Ownership(folder, start)
    first.check()
    assert folder.num_tidied == 1


@pytest.mark.parametrize("start", [Start("7", 1, "7-1"), Start("7", 0, "7-0")])
def test_restarted_job_takes_folder_from_running_predecessor(folder, start, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reid"), "propagate", True)
    zombie = Ownership(folder, Start("7", 0, "7-0"))
    folder.is_free = False
    with caplog.at_level(logging.WARNING, "reid"):
        owner = Ownership(folder, start)
    assert f"OUTPUT_DIR={folder.path} is taken over" in caplog.text
    owner.check()
    with refused(TakenOverError, "OUTPUT_DIR", f"restart {start.restart} of job 7"):
        zombie.check()


def test_lock_is_acquired_once_the_previous_start_releases_it(folder):
    Ownership(folder, Start("7", 0, "7-0"))
    folder.is_free = False
    owner = Ownership(folder, Start("7", 1, "7-1"))
    owner.check()
    folder.is_free = True
    num_before = folder.num_locked
    owner.check()
    owner.check()
    assert folder.num_locked == num_before + 1


@pytest.mark.parametrize("is_free", [True, False])
def test_superseded_start_that_comes_late_is_rejected(folder, is_free):
    owner = Ownership(folder, Start("7", 2, "7-2"))
    folder.is_free = is_free
    with refused(TakenOverError, "OUTPUT_DIR", "restart 2 of job 7"):
        Ownership(folder, Start("7", 1, "7-1"))
    owner.check()


@pytest.mark.parametrize("event", list(Records))
def test_superseded_start_ends_before_writing_a_record(folder, event):
    zombie, written = Ownership(folder, Start("7", 0, "7-0")), []
    trainer = Engine(lambda engine, batch: engine.fire_event(event))
    trainer.register_events(*Records)
    zombie.attach(trainer)
    trainer.add_event_handler(event, lambda: written.append(1))
    trainer.run([0], max_epochs=1)
    assert written == [1]
    Ownership(folder, Start("7", 1, "7-1"))
    with pytest.raises(TakenOverError):
        trainer.run([0], max_epochs=1)
    assert written == [1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"start": {"job": "7", "wrong": 1}}', '{"start": 1}'])
def test_a_file_that_is_none_of_ours_is_nobodys(folder, content):
    (folder.path / "owner.json").write_text(content)
    owner = Ownership(folder, Start("7", 0, "7-0"))
    (folder.path / "owner.json").write_text(content)
    owner.check()


def test_owner_file_names_start_and_host(folder):
    Ownership(folder, Start("7", 1, "7-1"))
    content = json.loads((folder.path / "owner.json").read_text())
    assert content["start"] == {"job": "7", "restart": 1, "rendezvous": "7-1"}
    assert content["host"]
