"""Files that appear whole, or stay what they were."""

import errno
import os

import pytest
from refusals import refused

from reid.errors import WorldError
from reid.whole_files import appearing, disk_errors


def test_the_file_takes_its_name_at_the_end(tmp_path):
    file = tmp_path / "a.pt2"
    with appearing(file, key="--output") as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".pt2"
        assert not file.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
    assert file.read_text() == "new"


def test_an_error_leaves_what_stood_there_and_nothing_else(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(TypeError), appearing(file, key="--output") as temporary:
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
    with (
        refused(WorldError, "--json", f"{tmp_path}/no/a.txt", "No such file"),
        appearing(tmp_path / "no" / "a.txt", key="--json") as file,
    ):
        file.write_text("x")
