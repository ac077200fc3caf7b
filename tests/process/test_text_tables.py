"""Columns of text are as wide as their widest cell and no wider."""

import doctest

import pytest

from reid.process import text_tables
from reid.process.text_tables import format_table


def test_columns_are_aligned_to_their_widest_cell():
    rows = [["name", "n", "note"], ["a", "1,234", ""], ["longer", "5", "x"]]
    assert format_table(rows, "<><").splitlines() == [
        "name        n  note",
        "a       1,234",
        "longer      5  x",
    ]


def test_columns_may_be_separated_by_any_text():
    assert format_table([["", "a", "b", ""], ["", "10", "2", ""]], "<<><", " | ").splitlines() == [
        " | a  | b |",
        " | 10 | 2 |",
    ]


def test_cells_may_hold_braces_and_wide_numbers_of_columns():
    assert format_table([["{x}", *"abcdef"]], "<" + ">" * 6, " ") == "{x} a b c d e f"


def test_rows_of_unequal_length_are_rejected():
    with pytest.raises(ValueError, match="zip"):
        format_table([["a", "b"], ["c"]], "<<")


def test_the_example_is_right():
    assert doctest.testmod(text_tables).failed == 0
