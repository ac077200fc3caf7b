"""Validators of single settings: from a value as the user wrote it to the canonical one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from reid.config.parsing import bare, elements_of, example, literal, nearest, number_of, shown

# Takes a value as the user wrote it and returns the canonical one, or raises Refused.
Check = Callable[[Any], Any]


class Refused(Exception):
    """A value that will not do: what is wanted instead ("a whole number >= 1") and, where there is one, a remedy."""

    def __init__(self, wanted: str, remedy: str = "") -> None:
        super().__init__(wanted)
        self.wanted = wanted
        self.remedy = remedy


def flag(value: Any) -> bool:
    """True or false in any of YAML's spellings; reid-strong-baseline quotes its 'yes' and 'on'."""
    word = bare(value).lower() if isinstance(value, str) else value
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
        word = bare(value) if isinstance(value, str) else None
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
        word = bare(value) if isinstance(value, str) else value
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
        number = literal(bare(value)) if isinstance(value, str) else value
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
        number = number_of(value)
        if not math.isfinite(number) or number < minimum or not above < number < below or number > maximum:
            raise Refused(wanted)
        return number

    return check


def optional(check: Check) -> Check:
    """None, or what `check` wants."""

    def check_or_none(value: Any) -> Any:
        if value is None or (isinstance(value, str) and bare(value).lower() in ("none", "null")):
            return None
        try:
            return check(value)
        except Refused as refused:
            raise Refused(f"{refused.wanted} or None", refused.remedy) from None

    return check_or_none


def sequence(item: Check, wanted: str, *, length: int | None = None, least: int = 0) -> Check:
    """A tuple of values that each pass `item`."""

    def check(value: Any) -> tuple[Any, ...]:
        elements = elements_of(value)
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
