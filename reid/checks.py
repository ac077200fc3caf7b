"""From what a file or a command line says to plain values: reading, converting, and the reason when one is refused."""

from __future__ import annotations

import ast
import difflib
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from reid.errors import SettingsError

# Takes a value as the user wrote it and returns the canonical one, or raises Refused.
Check = Callable[[Any], Any]

_NULL = "tag:yaml.org,2002:null"
_file_error = partial(SettingsError, key="--config_file")


class Refused(Exception):
    """A value that will not do: what is wanted instead ("a whole number >= 1") and, where there is one, a remedy."""

    def __init__(self, wanted: str, remedy: str = "") -> None:
        super().__init__(wanted)
        self.wanted = wanted
        self.remedy = remedy


class Given(NamedTuple):
    """One setting as the user wrote it."""

    key: str  # full key, as SOLVER.BASE_LR
    value: Any
    where: str  # "in FILE, line N" or "on the command line"


# ---- reading ----


def read_file(file: str, sections: Collection[str]) -> Iterator[Given]:
    """The settings of a YAML file in its order; only `sections` are descended into."""
    text = _text_of(file)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None or root.tag == _NULL:
            return
        if not isinstance(root, yaml.MappingNode):
            got = shown(loader.construct_object(root, deep=True))
            raise _file_error(f"{file} must hold KEY: VALUE lines, got {got}; write for example SEED: 0")
        yield from _settings_in(root, "", _Reader(file, loader, sections, {}))
    except yaml.reader.ReaderError as error:
        got = f"character {error.character:#x} in line {text.count(chr(10), 0, error.position) + 1}"
        raise _file_error(f"{file} must be plain text, got {got}; remove it") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _file_error(f"{file} must be valid YAML, got: {error.problem}{place}; correct that line") from error


def read_overrides(items: Iterable[str], known: Collection[str]) -> Iterator[Given]:
    """The settings of a command line, KEY VALUE pairs and KEY=VALUE items in any mixture."""
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
        yield Given(key, value, "on the command line")


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
    lines: dict[str, int]  # where each key was first given


def _settings_in(mapping: yaml.MappingNode, prefix: str, reader: _Reader) -> Iterator[Given]:
    for key_node, node in mapping.value:
        line = key_node.start_mark.line + 1
        where = f"in {reader.file}, line {line}"
        if key_node.tag != "tag:yaml.org,2002:str":
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise _file_error(f"a key must be text, got {name} {where}; write a key of the configuration")
        key = prefix + key_node.value
        if key in reader.lines:
            got = f"it {where} and line {reader.lines[key]}"
            raise SettingsError(f"{key} must be given once, got {got}; remove one", key=key)
        reader.lines[key] = line
        if key in reader.sections and isinstance(node, yaml.MappingNode):
            yield from _settings_in(node, f"{key}.", reader)
        elif key not in reader.sections or node.tag != _NULL:  # else a section whose keys are all commented out
            yield Given(key, _value_of(node, key, where, reader.loader), where)


def _value_of(node: yaml.Node, key: str, where: str, loader: yaml.SafeLoader) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # a date with month 13, a number of 5,000 digits
        message = f"{key} must have a value that YAML can read, got {error} {where}; quote it"
        raise SettingsError(message, key=key) from error


# ---- converting ----


def flag(value: Any) -> bool:
    """True or false in any of YAML's spellings; reid-strong-baseline quotes its 'yes' and 'on'."""
    word = _bare(value).lower() if isinstance(value, str) else value
    if isinstance(word, bool):
        return word
    if word in ("yes", "on", "true"):
        return True
    if word in ("no", "off", "false"):
        return False
    raise Refused("yes or no")


def text(*, shortest: int = 0, longest: int | None = None, without: str = "") -> Check:
    wanted = "text" if longest is None else f"text of {shortest} to {longest} characters"
    wanted += f" without any of {without}" if without else ""

    def check(value: Any) -> str:
        word = _bare(value) if isinstance(value, str) else None
        if value is None or word == "None":
            raise Refused(wanted, "use ''" if shortest == 0 else "")
        if word is None:
            raise Refused(wanted, "put it in quotes")
        if len(word) < shortest or len(word) > (longest or math.inf) or set(word) & set(without):
            raise Refused(wanted)
        return word

    return check


def one_of(*choices: str, or_prefix: str = "") -> Check:
    """One of the choices, or any word that begins with `or_prefix` and goes on behind it."""
    wanted = "one of " + ", ".join(choice or "''" for choice in choices)
    wanted += f", or {or_prefix}NAME" if or_prefix else ""

    def check(value: Any) -> str:
        word = _bare(value) if isinstance(value, str) else value
        if isinstance(value, bool):  # what YAML 1.1 reads an unquoted yes, no, on or off as
            word = next((meant for meant in (("yes", "on") if value else ("no", "off")) if meant in choices), value)
        if isinstance(word, str) and word in choices:
            return word
        if or_prefix and isinstance(word, str) and word.startswith(or_prefix) and word != or_prefix:
            return word
        near = nearest(str(word), choices)
        raise Refused(wanted, f"did you mean {near[0]}?" if near else "")

    return check


def integer(minimum: int, maximum: int | None = None) -> Check:
    wanted = f"a whole number >= {minimum}" if maximum is None else f"a whole number from {minimum} to {maximum}"

    def check(value: Any) -> int:
        number = _literal(_bare(value)) if isinstance(value, str) else value
        whole = int(number) if isinstance(number, float) and number.is_integer() else number
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < minimum or whole > (maximum or math.inf):
            raise Refused(wanted)
        if isinstance(number, float):  # 64.0 may be a slip for 6.40, so it is not taken silently
            raise Refused(wanted, f"use {whole}")
        return whole

    return check


def real(
    *, minimum: float = -math.inf, above: float = -math.inf, maximum: float = math.inf, below: float = math.inf
) -> Check:
    """A finite number; `above` is a minimum and `below` a maximum that is itself left out."""
    bounds = (
        f" from {minimum:g} to {maximum:g}" if maximum < math.inf else f" >= {minimum:g}" if minimum > above else ""
    )
    wanted = "a number" + (bounds or (f" > {above:g}" if above > -math.inf else ""))

    def check(value: Any) -> float:
        number = _number(value)
        if not math.isfinite(number) or number < minimum or not above < number < below or number > maximum:
            raise Refused(wanted)
        return number

    return check


def optional(check: Check) -> Check:
    """None, or what `check` wants."""

    def check_or_none(value: Any) -> Any:
        if value is None or (isinstance(value, str) and _bare(value).lower() in ("none", "null")):
            return None
        try:
            return check(value)
        except Refused as refused:
            raise Refused(f"{refused.wanted} or None", refused.remedy) from None

    return check_or_none


def sequence(item: Check, wanted: str, *, length: int | None = None, least: int = 0) -> Check:
    """A tuple of values that each pass `item`."""

    def check(value: Any) -> tuple[Any, ...]:
        elements = _elements(value)
        if len(elements) < least or (length is not None and len(elements) != length):
            raise Refused(wanted)
        passed = []
        for element in elements:
            try:
                passed.append(item(element))
            except Refused as refused:
                of_which = f"{shown(element)}: " if refused.remedy and len(elements) > 1 else ""
                raise Refused(wanted, of_which + refused.remedy) from None
        return tuple(passed)

    return check


def increasing(check: Check) -> Check:
    def check_order(value: Any) -> Any:
        values = check(value)
        if list(values) != sorted(set(values)):
            raise Refused("increasing whole numbers >= 0", f"use {example(sorted(set(values)))}")
        return values

    return check_order


def distinct(check: Check) -> Check:
    def check_repetition(value: Any) -> Any:
        values = check(value)
        if len(set(values)) < len(values):
            raise Refused("a list without repetition", f"use {example(list(dict.fromkeys(values)))}")
        return values

    return check_repetition


def as_list(check: Check) -> Check:
    return lambda value: list(check(value))


# ---- wording ----


def shown(value: Any) -> str:
    """The value in an error message, cut where it would fill the screen."""
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


def example(value: Any) -> str:
    """The value as the user may write it, in a file and on a command line alike."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return "''" if value == "" else str(value)


def nearest(word: str, words: Collection[str]) -> list[str]:
    """What the user may have meant: the same in another case, the same last part elsewhere, or the most similar."""
    by_lower = {candidate.lower(): candidate for candidate in words}
    if word.lower() in by_lower:
        return [by_lower[word.lower()]]
    last = word.lower().rpartition(".")[2]
    moved = [candidate for lower, candidate in by_lower.items() if lower.endswith(f".{last}")]
    return moved or [by_lower[lower] for lower in difflib.get_close_matches(word.lower(), by_lower, n=1)]


def multiples_around(value: int, step: int, least: int) -> str:
    """The multiples of `step` next to `value`, not below `least`."""
    below = value // step * step
    return f"{below} or {below + step}" if below >= least else str(max(below + step, least))


# ---- literals ----


def _literal(word: str) -> Any:
    """The Python literal that a text spells, or the text itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's complaints about the user's text as source code
            return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word


def _bare(word: str) -> str:
    """The text without the quotes and brackets of a string literal: "('0')" is what old commands say for 0."""
    while isinstance(inner := _literal(word), str) and inner != word:
        word = inner
    return word


def _number(value: Any) -> float:
    """A float, from YAML's 1e-3 too, which YAML 1.1 reads as text; NaN for what is no number."""
    number = _literal(_bare(value)) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        return math.nan
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _elements(value: Any) -> list[Any]:
    """The elements of [a, b], "(a, b)", "[a,b]", "a,b"; of a lone value, as "('market1501')" or (40), that one."""
    if isinstance(value, str):
        value = _literal(_bare(value))
    if isinstance(value, str):
        return [part.strip() for part in value.strip("[]() ").split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
