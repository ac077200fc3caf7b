"""Variables from a file .env: for keys that belong neither into a settings file nor into a shell's history."""

from __future__ import annotations

import io
from collections.abc import MutableMapping
from pathlib import Path

from dotenv.parser import parse_stream

from reid.errors import SettingsError


def load_environment_file(file: Path, environment: MutableMapping[str, str]) -> None:
    """Add the variables of the file that the environment does not have; do nothing without a file.

    Lines are parsed by python-dotenv; `$NAME` is not expanded.

    Raises:
        SettingsError: The file is unreadable or has another line, which is not shown because it may hold a key.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{file} must be readable, got {type(error).__name__}. Fix: correct or remove it.", key=file.name
        ) from error
    # Not load_dotenv: it only logs a line that it cannot parse, and a key would be missing later.
    for name, value, original, is_wrong in parse_stream(io.StringIO(text)):
        if is_wrong or (name and value is None):
            raise SettingsError(f"line {original.line} of {file} must be NAME=VALUE. Fix: correct it.", key=file.name)
        if name and value is not None:
            environment.setdefault(name, value)
