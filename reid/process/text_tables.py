"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], align: str, separator: str = "  ") -> str:
    """Return a table of text, one line for each row, without spaces at the ends of lines.

    Args:
        rows: Cells of each row, the heading included; all rows are equally long.
        align: One character for each column, "<" for left and ">" for right.
        separator: Text between two columns.

    Example:
        >>> print(format_table([["run", "mAP"], ["a", "85.9"]], "<>"))
        run   mAP
        a    85.9
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        separator.join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
