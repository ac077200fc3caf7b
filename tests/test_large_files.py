"""Copies that are whole, and that leave nothing behind; `new_file` is held to account in test_store.py."""

import errno
import fcntl
import os

import numpy as np
import pytest

from reid.data import large_files
from reid.data.large_files import copied, copy_of


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Of three pieces and a bit."""
    monkeypatch.setattr(large_files, "_PIECE", 1000)
    file = tmp_path / "a" / "images.npy"
    file.parent.mkdir()
    file.write_bytes(np.random.default_rng(0).bytes(3001))
    return file


def test_a_copy_lasts_as_long_as_it_is_needed(tmp_path, file):
    copy = copy_of(file, tmp_path / "b" / "c", "token")
    with copied(file, copy):
        assert copy.read_bytes() == file.read_bytes()
        opened = np.memmap(copy, mode="r")
        with copied(file, copy_of(file, copy.parent, "other")):  # another run's, which does not take ours away
            assert len(list(copy.parent.iterdir())) == 2
    assert list(copy.parent.iterdir()) == []
    assert opened.tobytes() == file.read_bytes()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, file):
    left = copy_of(file, tmp_path, "killed")
    left.touch()
    held = copy_of(file, tmp_path, "alive")
    with held.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with copied(file, copy_of(file, tmp_path, "token")):
            assert not left.exists()
            assert held.exists()


def test_a_copy_that_differs_is_rejected_and_removed(tmp_path, file, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: pread(*arguments)[:-1] + b"x")
    copy = copy_of(file, tmp_path, "token")
    with pytest.raises(OSError, match="not what was read"), copied(file, copy):
        pytest.fail("was taken")
    assert not copy.exists()


def test_no_room_is_found_before_the_first_byte(tmp_path, file, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    copy = copy_of(file, tmp_path, "token")
    with pytest.raises(OSError, match="No space left"), copied(file, copy):
        pytest.fail("was taken")
    assert not copy.exists()
