"""Any data set as a CSV or Parquet table with the columns path, pid, camid and split."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reid.config.benchmark_names import PARTS, Part
from reid.data.benchmarks.splits import (
    Benchmark,
    build_benchmark,
    is_file,
    make_split,
    require_distinct,
    require_present,
    shown,
    splits_of,
)
from reid.errors import DataError, WorldError

COLUMNS = ("path", "pid", "camid", "split")
SPLITS = ("train", "query", "gallery")
_SEPARATORS = ",;\t"
_REMEDY = "correct the table"
_KEY = "DATASETS.NAMES"  # of every error here: the setting that names tables
_LARGEST = 2**31  # numbers above it are taken as text
_JUNK = ("-1", "-1.0")


class Row(NamedTuple):
    """One image; `where` is its place in the table, for messages."""

    where: str
    path: str
    pid: str
    camid: str
    split: str


def read_table(name: str, root_dir: Path, parts: Sequence[Part] = PARTS) -> Benchmark:
    """A data set from a table with one row for each image of a split; further columns are ignored.

    `path` is relative to the table's folder, or absolute. `pid` and `camid` are any text or number; the same text is
    the same person or camera, in all splits. Whole numbers stay as they are, other texts are numbered in sorted order.
    Pid -1 is junk and dropped; any other pid, 0 as well, is a person, and one that no query has is a distractor.
    A query is looked for on other cameras than its own; without cameras, write 0 for queries and 1 for the gallery.
    `split` is train, query or gallery.

    Args:
        name: path of the table, from the working directory or else from `root_dir`. In CSV (UTF-8) the separator is a
            comma, a semicolon or a tab.
        root_dir: see `name`.
        parts: what to read; images of the other splits need not be there.

    Raises:
        DataError: the table cannot be read, a column is missing or given twice, a cell is empty or not what it must
            be, an image is missing or named twice in a split, a split has no rows, there are fewer than two identities
            to train, or no query has a match in the gallery.
        WorldError: the package that reads Parquet is not installed.
    """
    table = _find(name, root_dir)
    rows = _read_parquet(table) if table.suffix.lower() == ".parquet" else _read_csv(table)
    _check(table, rows)
    pids = _numbers({row.pid for row in rows} - set(_JUNK)) | dict.fromkeys(_JUNK, -1)
    camids = _numbers({row.camid for row in rows})
    raw = {}
    for split in splits_of(parts):
        chosen = [row for row in rows if row.split == split]
        if not chosen:
            wanted = ", ".join(splits_of(parts))
            raise DataError(
                f"{table} must have rows of the splits {wanted}, but has none of {split}; {_REMEDY}", key=_KEY
            )
        paths = [table.parent / row.path for row in chosen]
        require_distinct(f"{table} ({split})", paths, _REMEDY, key=_KEY)
        require_present(
            f"{table} ({split})", paths, "paths are relative to the table's folder; correct the table", key=_KEY
        )
        raw[split] = make_split(
            (path, pids[row.pid], camids[row.camid]) for path, row in zip(paths, chosen, strict=True)
        )
    places = {split: f"{table} ({split})" for split in SPLITS}
    return build_benchmark(re.sub(r"[^\w.-]", "_", table.stem), table, raw, places, remedy=_REMEDY, key=_KEY)


def _find(name: str, root_dir: Path) -> Path:
    places = (Path(name), root_dir / name)
    for place in places:
        if is_file(place):
            return place.absolute()
    raise DataError(
        f"DATASETS.NAMES must name a table that is there, got {name}, which is neither {places[0].absolute()} nor "
        f"{places[1].absolute()}; correct its path",
        key=_KEY,
    )


def _numbers(texts: Iterable[str]) -> dict[str, int]:
    """A number for each text: its own where all are whole numbers that differ, else its place in sorted order."""
    ordered = sorted(texts)
    if all(text.isascii() and text.isdigit() for text in ordered):
        own = {text: int(text) for text in ordered}
        if len(set(own.values())) == len(own) and max(own.values(), default=0) < _LARGEST:
            return own
    return {text: number for number, text in enumerate(ordered)}


def _check(table: Path, rows: Sequence[Row]) -> None:
    if not rows:
        raise DataError(f"{table} must have a row for each image, but has none; {_REMEDY}", key=_KEY)
    for column in COLUMNS:
        empty = [row.where for row in rows if not getattr(row, column)]
        if empty:
            raise DataError(
                f"every row of {table} must have a {column}, but {len(empty)} have none ({shown(empty)}); {_REMEDY}",
                key=_KEY,
            )
    unknown = [f"{row.split!r} in {row.where}" for row in rows if row.split not in SPLITS]
    if unknown:
        raise DataError(
            f"the split of a row of {table} must be one of {', '.join(SPLITS)}, but {len(unknown)} are not "
            f"({shown(unknown)}); {_REMEDY}",
            key=_KEY,
        )


def _check_columns(table: Path, header: Sequence[str], note: str = "") -> None:
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise DataError(
            f"{table} must have the columns {', '.join(COLUMNS)}, but lacks {', '.join(missing)} (it has "
            f"{shown([name or 'one without a name' for name in header])}{note}); {_REMEDY}",
            key=_KEY,
        )
    twice = [column for column in COLUMNS if list(header).count(column) > 1]
    if twice:
        raise DataError(f"{table} must have each column once, but has {', '.join(twice)} again; remove one", key=_KEY)


# ---- CSV ----


def _read_csv(table: Path) -> list[Row]:
    text = _text_of(table)
    first_line = next(iter(text.splitlines()), "")
    separator = max(_SEPARATORS, key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        _check_columns(table, header)
        places = [header.index(column) for column in COLUMNS]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"line {reader.line_num}"
            if len(cells) != len(header):
                raise DataError(
                    f"every row of {table} must have {len(header)} cells, got {len(cells)} in {where}; "
                    "put a cell that holds the separator in double quotes",
                    key=_KEY,
                )
            path, pid, camid, split = (cells[place].strip() for place in places)
            rows.append(Row(where, path, pid, camid, split.lower()))
    except csv.Error as error:
        raise DataError(
            f"{table} must be a CSV table, got: {error} in line {reader.line_num}; {_REMEDY}", key=_KEY
        ) from error
    return rows


def _text_of(table: Path) -> str:
    try:
        content = table.read_bytes()
    except OSError as error:
        raise DataError(
            f"{table} must be a table that can be read, got: {error.strerror}; {_REMEDY}", key=_KEY
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{table} must be UTF-8 text, got the byte {content[error.start]:#x} in line {line}; save it as UTF-8",
            key=_KEY,
        ) from error
    if "\0" in text:
        raise DataError(f"{table} must be UTF-8 text, got a zero byte; save it as UTF-8", key=_KEY)
    return text


# ---- Parquet ----


def _read_parquet(table: Path) -> list[Row]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise WorldError(
            f"the package pyarrow, which reads {table}, is not installed; run: uv sync --extra parquet", key=_KEY
        ) from error
    try:
        file = parquet.ParquetFile(table)
        header = [name.strip().lower() for name in file.schema_arrow.names]
        _check_columns(table, header)
        own_names = [file.schema_arrow.names[header.index(column)] for column in COLUMNS]
        content = file.read(columns=own_names)
        columns = [content.column(name).to_pylist() for name in own_names]
    except (arrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{table} must be a Parquet table that can be read, got: {reason}; write it again", key=_KEY
        ) from error
    rows = []
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        path, pid, camid, split = (
            _cell(table, name, number, value) for name, value in zip(COLUMNS, cells, strict=True)
        )
        rows.append(Row(f"row {number}", path, pid, camid, split.lower()))
    return rows


def _cell(table: Path, column: str, number: int, value: Any) -> str:
    """The value as a CSV table would have it."""
    if value is None or value != value:  # NaN, as pandas writes a missing number
        return ""
    if isinstance(value, float) and value.is_integer():  # as pandas writes whole numbers beside a missing one
        value = int(value)
    if isinstance(value, bool | bytes) or not isinstance(value, str | int | float):
        raise DataError(
            f"the {column} of a row of {table} must be text or a number, got {value!r:.80} in row {number}; {_REMEDY}",
            key=_KEY,
        )
    return str(value).strip()
