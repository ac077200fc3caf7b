"""Files that are complete, or what they were before; `reserved_file` is tested in test_store.py."""

import errno
import fcntl
import os
import resource

import numpy as np
import pytest
from refusals import refused

from reid.errors import WorldError
from reid.process import files
from reid.process.files import atomic_write, copy_path, disk_errors, printable, temporary_copy, write_text


def test_the_file_takes_its_name_at_the_end(tmp_path):
    file = tmp_path / "a.pt2"
    with atomic_write(file, key="--output") as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".pt2"
        assert not file.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
    assert file.read_text() == "new"


def test_an_error_leaves_what_stood_there_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(TypeError), atomic_write(file, key="--output") as temporary:
        temporary.write_text(f"new {temporary.write_text('new') + None}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_text() == "old"


def test_full_disk_is_reported_in_one_sentence(tmp_path):
    with (
        refused(WorldError, "--output", "out ", "No space left"),
        disk_errors("out", key="--output"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_missing_folder_is_reported_in_one_sentence(tmp_path):
    with refused(WorldError, "--json", f"{tmp_path}/no/a.txt", "No such file"):
        write_text(tmp_path / "no" / "a.txt", "x", key="--json")


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    file = tmp_path / "result.json"
    write_text(file, "old", key="OUTPUT_DIR")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with refused(WorldError, "OUTPUT_DIR", str(file), "File too large"):
            write_text(file, "new" * 100, key="OUTPUT_DIR")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("result.json", "old")]


def test_the_file_is_not_created_if_verification_fails(tmp_path):
    def verify():
        raise ValueError("taken over")

    with pytest.raises(ValueError, match="taken over"), atomic_write(tmp_path / "a", key="", verify=verify) as file:
        file.touch()
    assert list(tmp_path.iterdir()) == []


def test_file_names_that_are_not_text_become_printable(tmp_path):
    assert printable(tmp_path / "\udcffü.jpg") == f"{tmp_path}/\\udcffü.jpg"


# ---- copies ----


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Create a file of a little more than three chunks."""
    monkeypatch.setattr(files, "_CHUNK", 1000)
    file = tmp_path / "a" / "images.npy"
    file.parent.mkdir()
    file.write_bytes(np.random.default_rng(0).bytes(3001))
    return file


def test_a_copy_lasts_as_long_as_it_is_needed(tmp_path, file):
    copy = copy_path(file, tmp_path / "b" / "c", "token")
    with temporary_copy(file, copy):
        assert copy.read_bytes() == file.read_bytes()
        opened = np.memmap(copy, mode="r")
        with temporary_copy(
            file, copy_path(file, copy.parent, "other")
        ):  # another run's, which does not take ours away
            assert len(list(copy.parent.iterdir())) == 2
    assert list(copy.parent.iterdir()) == []
    assert opened.tobytes() == file.read_bytes()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, file):
    left = copy_path(file, tmp_path, "killed")
    left.touch()
    held = copy_path(file, tmp_path, "alive")
    with held.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with temporary_copy(file, copy_path(file, tmp_path, "token")):
            assert not left.exists()
            assert held.exists()


def test_a_copy_that_differs_is_rejected_and_removed(tmp_path, file, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: pread(*arguments)[:-1] + b"x")
    copy = copy_path(file, tmp_path, "token")
    with pytest.raises(OSError, match="differs from the file"), temporary_copy(file, copy):
        pytest.fail("was taken")
    assert not copy.exists()


def test_a_full_disk_is_detected_before_the_first_byte(tmp_path, file, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    copy = copy_path(file, tmp_path, "token")
    with pytest.raises(OSError, match="No space left"), temporary_copy(file, copy):
        pytest.fail("was taken")
    assert not copy.exists()
