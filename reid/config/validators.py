"""Validators of single settings: from a value as the user wrote it to the canonical one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reid.config.parsing import bare, elements_of, example, literal, nearest, number_of, quoted


class InvalidValue(Exception):
    """A value that a setting does not take; its text is the fix ("use 64"), or empty where none is known."""


@dataclass(frozen=True)
class Validator:
    """Converter of one type of value.

    Attributes:
        allowed: Allowed values, as part of a sentence: "a whole number >= 1".
        convert: Function from the user's value to the canonical one; raises InvalidValue.
    """

    allowed: str
    convert: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        return self.convert(value)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of the schema.

    Attributes:
        default: Value where neither a file nor the command line gives one.
        validate: Validator of its values.
        doc: Effect of the setting, reasons to change it and the source of its default.
        unit: Unit of the value; empty for none.
    """

    default: Any
    validate: Validator
    doc: str
    unit: str = ""


def _to_bool(value: Any) -> bool:
    written = bare(value).lower() if isinstance(value, str) else value
    if isinstance(written, bool):
        return written
    if written not in ("yes", "on", "true", "no", "off", "false"):
        raise InvalidValue
    return written in ("yes", "on", "true")


# Any of YAML's spellings; reid-strong-baseline quotes its 'yes' and 'on'.
flag = Validator("yes or no", _to_bool)


def text(*, shortest: int = 0, longest: int | None = None, without: str = "") -> Validator:
    """Return a validator of text of a limited length that holds none of the characters of `without`."""
    allowed = "text" if longest is None else f"text of {shortest} to {longest} characters"
    allowed += f" without any of {without}" if without else ""

    def convert(value: Any) -> str:
        written = bare(value) if isinstance(value, str) else None
        if value is None or written == "None":
            raise InvalidValue("use ''" if shortest == 0 else "")
        if written is None:
            raise InvalidValue("put it in quotes")
        if not shortest <= len(written) <= (longest or math.inf) or set(written) & set(without):
            raise InvalidValue
        return written

    return Validator(allowed, convert)


def one_of(*choices: str, or_prefix: str = "") -> Validator:
    """Return a validator of the choices, and of any longer text that starts with `or_prefix`."""
    allowed = "one of " + ", ".join(choice or "''" for choice in choices)
    allowed += f", or {or_prefix}NAME" if or_prefix else ""

    def convert(value: Any) -> str:
        choice = bare(value) if isinstance(value, str) else value
        if isinstance(value, bool):  # YAML 1.1 reads an unquoted yes, no, on or off as a bool
            choice = next((meant for meant in (("yes", "on") if value else ("no", "off")) if meant in choices), value)
        has_prefix = or_prefix and str(choice).removeprefix(or_prefix) not in ("", choice)
        if isinstance(choice, str) and (choice in choices or has_prefix):
            return choice
        near = nearest(str(choice), choices)
        raise InvalidValue(f"did you mean {near[0]}?" if near else "")

    return Validator(allowed, convert)


def integer(minimum: int, maximum: int | None = None) -> Validator:
    """Return a validator of integers between two limits, both included."""
    allowed = f"a whole number >= {minimum}" if maximum is None else f"a whole number from {minimum} to {maximum}"

    def convert(value: Any) -> int:
        number = literal(bare(value)) if isinstance(value, str) else value
        integral = int(number) if isinstance(number, float) and number.is_integer() else number
        is_integer = isinstance(integral, int) and not isinstance(integral, bool)
        if not is_integer or not minimum <= integral <= (maximum or math.inf):
            raise InvalidValue
        if isinstance(number, float):  # 64.0 may be a typing error for 6.40
            raise InvalidValue(f"use {integral}")
        return integral

    return Validator(allowed, convert)


def one_number_of(*choices: int) -> Validator:
    """Return a validator of some integers."""
    number = integer(min(choices))

    def convert(value: Any) -> int:
        chosen: int = number(value)
        if chosen not in choices:
            raise InvalidValue
        return chosen

    return Validator(f"one of {', '.join(map(str, choices))}", convert)


def real(
    *, minimum: float = -math.inf, above: float = -math.inf, maximum: float = math.inf, below: float = math.inf
) -> Validator:
    """Return a validator of finite numbers; `above` and `below` are limits that are themselves excluded."""
    bounds = (
        f" from {minimum:g} to {maximum:g}" if maximum < math.inf else f" >= {minimum:g}" if minimum > above else ""
    )
    allowed = "a number" + (bounds or (f" > {above:g}" if above > -math.inf else ""))

    def convert(value: Any) -> float:
        number = number_of(value)
        if not math.isfinite(number) or number < minimum or not above < number < below or number > maximum:
            raise InvalidValue
        return number

    return Validator(allowed, convert)


def optional(validator: Validator) -> Validator:
    """Return a validator that also takes None."""

    def convert(value: Any) -> Any:
        is_none = value is None or (isinstance(value, str) and bare(value).lower() in ("none", "null"))
        return None if is_none else validator(value)

    return Validator(f"{validator.allowed} or None", convert)


def sequence(item: Validator, allowed: str, *, length: int | None = None, least: int = 0) -> Validator:
    """Return a validator of tuples whose elements `item` accepts."""

    def convert(value: Any) -> tuple[Any, ...]:
        elements = elements_of(value)
        if len(elements) < least or (length is not None and len(elements) != length):
            raise InvalidValue
        converted = []
        for element in elements:
            try:
                converted.append(item(element))
            except InvalidValue as error:
                which = f"{quoted(element)}: " if str(error) and len(elements) > 1 else ""
                raise InvalidValue(f"{which}{error}") from None
        return tuple(converted)

    return Validator(allowed, convert)


def increasing(validator: Validator) -> Validator:
    """Return a validator of sequences that must also increase."""

    def convert(value: Any) -> Any:
        values = validator(value)
        if list(values) != sorted(set(values)):
            raise InvalidValue(f"use {example(sorted(set(values)))}")
        return values

    return Validator(f"increasing {validator.allowed}", convert)


def distinct(validator: Validator) -> Validator:
    """Return a validator of sequences that must not repeat an element."""

    def convert(value: Any) -> Any:
        values = validator(value)
        if len(set(values)) < len(values):
            raise InvalidValue(f"use {example(list(dict.fromkeys(values)))}")
        return values

    return Validator(f"{validator.allowed}, without repetition", convert)


def as_list(validator: Validator) -> Validator:
    """Return a validator that returns a list, not a tuple."""
    return Validator(validator.allowed, lambda value: list(validator(value)))
