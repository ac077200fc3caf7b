"""Any data set as a CSV or Parquet table with the columns path, pid, camid and split."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from reid.config.benchmark_names import PARTS, Part
from reid.data.benchmarks.folders import read_text, require_present
from reid.data.benchmarks.splits import Benchmark, build_benchmark, data_error, is_file, shown, splits_of
from reid.errors import WorldError, reason_of

COLUMNS = ("path", "pid", "camid", "split")
SPLITS = ("train", "query", "gallery")
_SEPARATORS = ",;\t"
_FIX = "correct the table"
_KEY = "DATASETS.NAMES"  # the setting that names tables
_LARGEST = 2**31  # numbers from here on are taken as text
_JUNK = ("-1", "-1.0")

_table_error = partial(data_error, fix=_FIX, key=_KEY)


class TableRow(NamedTuple):
    """An image in a table; `location` is its line or row, for messages."""

    location: str
    path: str
    pid: str
    camid: str
    split: str


def read_table(name: str, root_dir: Path, parts: Sequence[Part] = PARTS) -> Benchmark:
    """Return the data set of a table with one row for each image of a split; further columns are ignored.

    `path` is relative to the table's folder, or absolute. `pid` and `camid` are any text or number; equal texts mean
    the same person or camera, in all splits. Integers are kept, other texts are numbered in sorted order.
    Pid -1 is junk and dropped; any other pid, including 0, is a person, and one that no query has is a distractor.
    Matches of a query are on other cameras; without cameras, write 0 for queries and 1 for the gallery.
    `split` is train, query or gallery.

    Args:
        name: Path of the table, relative to the working directory or else to `root_dir`. A CSV table is in UTF-8 and
            separated by commas, semicolons or tabs.
        root_dir: DATASETS.ROOT_DIR.
        parts: Parts to read; images of the other splits need not exist.

    Raises:
        DataError: The table cannot be read, a column is missing or repeated, a cell is empty or invalid, an image is
            missing or repeated within a split, a split has no rows, there are fewer than two identities to train, or
            no query has a match in the gallery.
        WorldError: The package that reads Parquet is not installed.
    """
    candidates = [(folder / name).absolute() for folder in (Path(), root_dir)]
    table = next((path for path in candidates if is_file(path)), None)
    if table is None:
        raise data_error(
            f"DATASETS.NAMES must name an existing table, got {name}, which is neither {candidates[0]} nor "
            f"{candidates[1]}",
            "correct its path",
            _KEY,
        )
    rows = _read_parquet(table) if table.suffix.lower() == ".parquet" else _read_csv(table)
    _validate(table, rows)
    pids = _numbers({row.pid for row in rows} - set(_JUNK)) | dict.fromkeys(_JUNK, -1)
    camids = _numbers({row.camid for row in rows})
    raw, sources = {}, {split: f"{table} ({split})" for split in SPLITS}
    for split in splits_of(parts):
        selected = [(table.parent / row.path, pids[row.pid], camids[row.camid]) for row in rows if row.split == split]
        if not selected:
            raise _table_error(
                f"{table} must have rows of the splits {', '.join(splits_of(parts))}, got none of {split}"
            )
        _validate_paths(sources[split], [row[0] for row in selected])
        raw[split] = selected
    return build_benchmark(re.sub(r"[^\w.-]", "_", table.stem), table, raw, sources, fix=_FIX, key=_KEY)


def _numbers(texts: Iterable[str]) -> dict[str, int]:
    """Return a number for each text: its value if all are different integers, else its index in sorted order."""
    ordered = sorted(texts)
    if all(text.isascii() and text.isdigit() for text in ordered):
        values = {text: int(text) for text in ordered}
        if len(set(values.values())) == len(values) and max(values.values(), default=0) < _LARGEST:
            return values
    return {text: number for number, text in enumerate(ordered)}


def _validate_paths(source: str, paths: Sequence[Path]) -> None:
    repeated = [str(path) for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise _table_error(f"{source} must name an image once, but {len(repeated)} are repeated ({shown(repeated)})")
    require_present(source, paths, "correct the paths, which are relative to the table's folder", key=_KEY)


def _validate(table: Path, rows: Sequence[TableRow]) -> None:
    if not rows:
        raise _table_error(f"{table} must have a row for each image, got none")
    for column in COLUMNS:
        empty = [row.location for row in rows if not getattr(row, column)]
        if empty:
            raise _table_error(
                f"every row of {table} must have a {column}, but {len(empty)} have none ({shown(empty)})"
            )
    unknown = [f"{row.split!r} in {row.location}" for row in rows if row.split not in SPLITS]
    if unknown:
        raise _table_error(
            f"the split of a row of {table} must be one of {', '.join(SPLITS)}, but {len(unknown)} are not "
            f"({shown(unknown)})"
        )


def _indices(table: Path, header: Iterable[str]) -> list[int]:
    """Return the index of each of `COLUMNS` in the header."""
    names = [name.strip().lower() for name in header]
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise _table_error(
            f"{table} must have the columns {', '.join(COLUMNS)}, but lacks {', '.join(missing)} (it has "
            f"{shown([name or 'one without a name' for name in names])})"
        )
    repeated = [column for column in COLUMNS if names.count(column) > 1]
    if repeated:
        raise _table_error(f"{table} must have each column once, but repeats {', '.join(repeated)}")
    return [names.index(column) for column in COLUMNS]


def _read_csv(table: Path) -> list[TableRow]:
    text = read_text(table, _KEY)
    first_line = next(iter(text.splitlines()), "")
    separator = max(_SEPARATORS, key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        header = next(reader, [])
        indices = _indices(table, header)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            location = f"line {reader.line_num}"
            if len(cells) != len(header):
                raise _table_error(
                    f"every row of {table} must have {len(header)} cells, got {len(cells)} in {location}",
                    fix="put a cell that holds the separator in double quotes",
                )
            path, pid, camid, split = (cells[index].strip() for index in indices)
            rows.append(TableRow(location, path, pid, camid, split.lower()))
    except csv.Error as error:
        raise _table_error(f"{table} must be a CSV table, got: {error} in line {reader.line_num}") from error
    return rows


def _read_parquet(table: Path) -> list[TableRow]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise WorldError(
            f"{table} needs the package pyarrow, which is not installed. Fix: run uv sync --extra parquet.", key=_KEY
        ) from error
    try:
        file = parquet.ParquetFile(table)
        header = file.schema_arrow.names
        names = [header[index] for index in _indices(table, header)]
        content = file.read(columns=names)
        columns = [content.column(name).to_pylist() for name in names]
    except (arrow.ArrowException, OSError) as error:
        reason = reason_of(error)
        raise _table_error(f"{table} must be a readable Parquet table, got: {reason}", fix="write it again") from error
    rows = []
    for number, values in enumerate(zip(*columns, strict=True), 1):
        cells = zip(COLUMNS, values, strict=True)
        path, pid, camid, split = (_cell(table, column, number, value) for column, value in cells)
        rows.append(TableRow(f"row {number}", path, pid, camid, split.lower()))
    return rows


def _cell(table: Path, column: str, number: int, value: Any) -> str:
    """Return the value as a CSV table would have it."""
    if value is None or value != value:  # NaN: pandas writes a missing number so
        return ""
    if isinstance(value, float) and value.is_integer():  # pandas writes integers so if one in the column is missing
        value = int(value)
    if isinstance(value, bool | bytes) or not isinstance(value, str | int | float):
        raise _table_error(
            f"the {column} of a row of {table} must be text or a number, got {value!r:.80} in row {number}"
        )
    return str(value).strip()
