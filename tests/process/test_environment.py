"""Variables from .env."""

import pytest
from refusals import refused

from reid.errors import SettingsError
from reid.process.environment import load_environment_file


def read(tmp_path, text: str, **before: str) -> dict[str, str]:
    (tmp_path / ".env").write_text(text)
    load_environment_file(tmp_path / ".env", before)
    return before


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("NAME=value", "value"),
        ("  export NAME = value  ", "value"),
        ("NAME='a b # c'", "a b # c"),
        ('NAME="a b" # a comment', "a b"),
        ("NAME=value # a comment", "value"),
        ("NAME=a#b", "a#b"),
        ("NAME=https://host:8080/x?y=z", "https://host:8080/x?y=z"),
        ("NAME=", ""),
        ("NAME=''", ""),
        ("NAME=$HOME", "$HOME"),
        ("NAME=a b", "a b"),
    ],
)
def test_a_line_gives_a_variable(tmp_path, line, value):
    assert read(tmp_path, f"# a comment\n\n{line}\n") == {"NAME": value}


def test_the_environment_keeps_its_values(tmp_path):
    assert read(tmp_path, "NAME=theirs\nOTHER=new\n", NAME="own") == {"NAME": "own", "OTHER": "new"}


def test_without_a_file_there_is_nothing_to_do(tmp_path):
    environment: dict[str, str] = {}
    load_environment_file(tmp_path / ".env", environment)
    assert environment == {}


@pytest.mark.parametrize("line", ["secret", "secret value", "NAME='secret", 'NAME="secret', "=secret"])
def test_another_line_is_named_and_not_shown(tmp_path, line):
    with pytest.raises(SettingsError, match="line 2") as error:
        read(tmp_path, f"NAME=value\n{line}\n")
    assert error.value.key == ".env"
    assert f"{tmp_path}/.env" in str(error.value)
    assert "secret" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / ".env").write_bytes(b"NAME=\xff\n")
    with refused(SettingsError, ".env", f"{tmp_path}/.env", "UnicodeDecodeError"):
        load_environment_file(tmp_path / ".env", {})
