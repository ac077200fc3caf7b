"""Errors for the user: what they carry, between processes too, and that every settings error names its key."""

import ast
import pickle
from pathlib import Path

import pytest

import reid
from reid.errors import DataError, NonFiniteError, ReidError, SettingsError, UnknownKeyError, WorldError, shared

KINDS = [SettingsError, UnknownKeyError, DataError, WorldError, NonFiniteError]
ROOT = Path(reid.__file__).parent
MODULES = sorted(file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.py"))


@pytest.mark.parametrize("kind", KINDS)
def test_error_defaults_to_no_key_and_not_shared(kind):
    error = kind("no room")
    assert (str(error), error.key, error.is_shared) == ("no room", None, False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_and_the_mark_reach_another_rank(kind):
    error = pickle.loads(pickle.dumps(shared(kind("it must be > 0", key="SOLVER.BASE_LR"))))
    assert type(error) is kind
    assert (str(error), error.key, error.is_shared) == ("it must be > 0", "SOLVER.BASE_LR", True)


def test_shared_marks_the_error_itself_and_no_other():
    error = WorldError("no room")
    assert shared(error) is error
    assert error.is_shared
    assert not WorldError("no room").is_shared


def test_unknown_key_error_is_key_error_with_plain_message():
    error = UnknownKeyError("there is no 'SEEDS'", key="SEEDS")
    assert isinstance(error, KeyError)
    assert str(error) == "there is no 'SEEDS'"


@pytest.mark.parametrize("module", MODULES)
def test_every_settings_error_names_its_key(module):
    calls = [node for node in ast.walk(ast.parse((ROOT / module).read_text())) if isinstance(node, ast.Call)]
    without_key = [
        f"{module}:{call.lineno}"
        for call in calls
        if ast.unparse(call.func).rpartition(".")[2] in ("SettingsError", "UnknownKeyError")
        and "key" not in [keyword.arg for keyword in call.keywords]
    ]
    assert without_key == []


def test_any_error_for_the_user_is_caught_as_one():
    assert all(issubclass(kind, ReidError) for kind in KINDS)
