"""Variables from a file .env: for keys that belong neither into a settings file nor into a shell's history."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from pathlib import Path

from reid.errors import SettingsError

_LINE = re.compile(
    r"""\s* (?:export\s+)? (?P<name>[A-Za-z_]\w*) \s*=\s*
    (?: '(?P<single>[^']*)' | "(?P<double>[^"]*)" | (?P<bare>[^\s'"\#][^\s'"]*)? ) \s* (?:(?<=\s)\#.*)?""",
    re.VERBOSE,
)


def read_environment_file(file: Path, environment: MutableMapping[str, str]) -> None:
    """Adds the file's variables to those of the environment, which keep their values; without a file, none.

    A line is NAME=VALUE, 'VALUE' or "VALUE" (no escapes, nothing is filled in), with or without export before it and a
    comment behind it.

    Raises:
        SettingsError: a line is something else; it is not shown, as it may hold a key.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{file} cannot be read ({type(error).__name__}); correct or remove it", key=file.name
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise SettingsError(
                f"line {number} of {file} must be NAME=VALUE, with quotes around a value that has spaces or quotes in "
                "it; correct it",
                key=file.name,
            )
        environment.setdefault(match["name"], match["single"] or match["double"] or match["bare"] or "")
