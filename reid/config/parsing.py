"""Raw settings of files and command lines, the literals they are written in, and their form in messages."""

from __future__ import annotations

import ast
import difflib
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from reid.errors import SettingsError

_NULL = "tag:yaml.org,2002:null"
_file_error = partial(SettingsError, key="--config_file")


class RawSetting(NamedTuple):
    """A setting as the user wrote it.

    Attributes:
        key: Full key, as SOLVER.BASE_LR.
        value: Value before conversion.
        source: "in FILE, line N" or "on the command line".
    """

    key: str
    value: Any
    source: str


# ---- reading ----


def read_file(file: str, sections: Collection[str]) -> Iterator[RawSetting]:
    """Yield the settings of a YAML file in its order; only `sections` are descended into."""
    text = _text_of(file)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None or root.tag == _NULL:
            return
        if not isinstance(root, yaml.MappingNode):
            got = quoted(loader.construct_object(root, deep=True))
            raise _file_error(f"{file} must hold KEY: VALUE lines, got {got}; write for example SEED: 0")
        yield from _settings_in(root, "", _Reader(file, loader, sections, {}))
    except yaml.reader.ReaderError as error:
        got = f"character {error.character:#x} in line {text.count(chr(10), 0, error.position) + 1}"
        raise _file_error(f"{file} must be plain text, got {got}; remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _file_error(f"{file} must be valid YAML, got: {error.problem}{position}; correct that line") from error


def read_overrides(items: Iterable[str], known: Collection[str]) -> Iterator[RawSetting]:
    """Yield the settings of a command line: KEY VALUE pairs and KEY=VALUE items in any mixture."""
    rest = iter(items)
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals:
            following = next(rest, None)
            # A missing value would swallow the next key: a value that starts with a key must be written as KEY=VALUE.
            if following is None or str(following).partition("=")[0] in known:
                got = "the end" if following is None else f"the key {following}"
                raise SettingsError(
                    f"{key} must be followed by its value on the command line, got {got}; use {key}=VALUE", key=key
                )
            value = following
        yield RawSetting(key, value, "on the command line")


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"the byte {error.object[error.start]:#x}"
        raise _file_error(f"{file} must be UTF-8 text, got {got}; save it as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise _file_error(f"{file} must be a file that can be read, got: {reason}; correct --config_file") from error


class _Reader(NamedTuple):
    file: str
    loader: yaml.SafeLoader
    sections: Collection[str]
    lines: dict[str, int]  # first line of each key


def _settings_in(mapping: yaml.MappingNode, prefix: str, reader: _Reader) -> Iterator[RawSetting]:
    for key_node, node in mapping.value:
        line = key_node.start_mark.line + 1
        source = f"in {reader.file}, line {line}"
        if key_node.tag != "tag:yaml.org,2002:str":
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise _file_error(f"a key must be text, got {name} {source}; write a key of the configuration")
        key = prefix + key_node.value
        if key in reader.lines:
            got = f"it {source} and line {reader.lines[key]}"
            raise SettingsError(f"{key} must be given once, got {got}; remove one", key=key)
        reader.lines[key] = line
        if key in reader.sections and isinstance(node, yaml.MappingNode):
            yield from _settings_in(node, f"{key}.", reader)
        elif key not in reader.sections or node.tag != _NULL:  # else a section whose keys are all commented out
            yield RawSetting(key, _value_of(node, key, source, reader.loader), source)


def _value_of(node: yaml.Node, key: str, source: str, loader: yaml.SafeLoader) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # a date with month 13, a number of 5,000 digits
        message = f"{key} must have a value that YAML can read, got {error} {source}; quote it"
        raise SettingsError(message, key=key) from error


# ---- wording ----


def quoted(value: Any) -> str:
    """Return the value as an error message quotes it, cut to 80 characters."""
    written = repr(value)
    return written if len(written) <= 80 else f"{written[:77]}..."


def example(value: Any) -> str:
    """Return the value as the user may write it, in a file and on a command line alike."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return "''" if value == "" else str(value)


def nearest(name: str, names: Collection[str]) -> list[str]:
    """Return the likely meaning: the name in another case, its last part in other sections, or the most similar."""
    name, by_lower = name.lower(), {candidate.lower(): candidate for candidate in names}
    if name in by_lower:
        return [by_lower[name]]
    last = name.rpartition(".")[2]
    moved = [candidate for lower, candidate in by_lower.items() if lower.endswith(f".{last}")]
    return moved or [by_lower[lower] for lower in difflib.get_close_matches(name, by_lower, n=1)]


# ---- literals ----


def literal(text: str) -> Any:
    """Return the Python literal that a text spells, or the text itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's complaints about the user's text as source code
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def bare(text: str) -> str:
    """Return the text without the quotes and brackets of a string literal; old commands write 0 as "('0')"."""
    while isinstance(inner := literal(text), str) and inner != text:
        text = inner
    return text


def number_of(value: Any) -> float:
    """Return a float, also from 1e-3, which YAML 1.1 reads as text; NaN for anything that is not a number."""
    number = literal(bare(value)) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        return math.nan
    try:
        return float(number)
    except OverflowError:
        return math.inf


def elements_of(value: Any) -> list[Any]:
    """Return the elements of [a, b], "(a, b)", "[a,b]" or "a,b"; a lone value, as "('market1501')", is one element."""
    if isinstance(value, str):
        value = literal(bare(value))
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
